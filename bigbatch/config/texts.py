"""How the keys of a config are set by texts: presets, settings, and what a wrong one is told."""

import ast
import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from bigbatch.config import lengths
from bigbatch.config.keys import FREE, MAY_BE_NONE, items, other_name, unlock_free_groups
from bigbatch.mistake import Mistake


def from_argument(
    config: ConfigDict,
    argument: str,
    presets: Mapping[str, Mapping[str, Any]],
    options: Mapping[str, Mapping[str, Mapping[str, Any] | Callable]] | None = None,
) -> ConfigDict:
    """Applies a preset and then `key=value` settings to `config`, in the order of the text.

    Args:
        config: with the settings that all presets share; it is changed in place, and locked.
        argument: "preset", "preset,key=value,...", or "" for the first preset.
        presets: {preset: {dotted key: value}}.
        options: {option: {name: {dotted key: value}}}, from which `option=name` chooses, for
            example `optimizer=adam`. Options are not keys of the config. The inner dict may also
            be a function that returns it for the config so far.

    Returns:
        `config`.

    Raises:
        Mistake: if a preset, option or key is unknown, or a value has the wrong type.
    """
    options = options or {}
    config.lock()
    unlock_free_groups(config)
    preset, *settings = _split(argument) or [next(iter(presets))]
    if "=" in preset:
        settings, preset = [preset, *settings], next(iter(presets))
    _set_all(config, _choose("preset", preset, presets))
    for setting in settings:
        key, separator, text = setting.partition("=")
        if not separator:
            raise Mistake(f"{setting!r} is no setting; write key=value after the preset.")
        if key in options:
            chosen = _choose(key, text, options[key])
            _set_all(config, chosen(config) if callable(chosen) else chosen)
        else:
            set_from_text(config, key, text)
    return config


def set_from_text(config: ConfigDict, key: str, text: str) -> None:
    """Sets the dotted `key` from the text of a command line, without changing the key's type.

    A key of `data.options`, `optimizer.options` or `task_options` that is new, or None, takes its
    type from the text.

    Raises:
        Mistake: if there is no such key, or the text is no value of its type.
    """
    group, name = _find(config, key)
    free = key.split(".")[:-1] in FREE
    if name not in group or (free and group.get_type(name) is type(None)):
        group[name] = _parse_free(text)
        return
    kind, may_be_none = group.get_type(name), free or key in MAY_BE_NONE
    try:
        group[name] = None if text == "None" and may_be_none else _parse(text, kind)
    except (ValueError, SyntaxError, TypeError, OverflowError):
        raise Mistake(
            f"config.{key} takes {_describe(kind)}{' or None' * may_be_none} (it is "
            f"{group[name]!r}), not {text!r}."
        ) from None


def refusal(configs: Sequence[ConfigDict], group: Any, name: Any, value: Any) -> str:
    """Why a config refused to read or to set a key; "" if that cannot be told.

    Args:
        configs: those that may be the whole config.
        group: the group of one of them that refused.
        name: of the key.
        value: that it was to be set to.
    """
    for config in configs:
        prefix = next((prefix for prefix, one in _groups(config) if one is group), None)
        if prefix is None or "seed" not in config:  # a part of the config, or none at all
            continue
        try:
            _find(config, f"{prefix}{name}")
        except Mistake as mistake:
            return str(mistake)
        kind = group.get_type(name)
        return (f"config.{prefix}{name} takes {_describe(kind)} (it is {group[name]!r}), "
                f"not {value!r}.")
    return ""


def _set_all(config: ConfigDict, settings: Mapping[str, Any]) -> None:
    for key, value in settings.items():
        group, name = _find(config, key)
        group[name] = value


def _choose(what: str, name: str, choices: Mapping[str, Any]) -> Any:
    if name not in choices:
        raise Mistake(f"{what} {name!r} is unknown; allowed are {', '.join(choices)}."
                      f"{other_name(name)}")
    return choices[name]


def _find(config: ConfigDict, key: str) -> tuple[ConfigDict, str]:
    """The group that holds the dotted `key`, and the key's last part.

    Of the groups in `FREE` the key need not be there yet.
    """
    group = config
    *path, name = key.split(".")
    for depth, part in enumerate([*path, name]):
        if path in FREE and depth == len(path) and part.isidentifier() and part not in group:
            return group, part
        if not isinstance(group, ConfigDict) or part not in group:
            parent = ".".join(["config", *key.split(".")[:depth]])
            if not isinstance(group, ConfigDict):
                raise Mistake(f"config.{key} is unknown: {parent} is a value, not a group.")
            what = {"data": "a loader", "optimizer": "an optimizer"}.get(".".join(path))
            own = (f" A key for {what} of your own is config.{path[0]}.options.{part}."
                   if depth == len(path) and what else "")
            raise Mistake(
                f"config.{key} is unknown{_near(config, key)}; {parent} has "
                f"{', '.join(sorted(group)) or 'no keys, as its config file gives it none'}.{own}"
            )
        if depth < len(path):
            group = group[part]
    if isinstance(group[name], ConfigDict):
        keys = ", ".join(f"{key}.{inner}" for inner in sorted(group[name]))
        keys = keys or (f"{key}.NAME, with a name of your own" if key.split(".") in FREE else
                        "it has none, as its config file gives it none")
        raise Mistake(f"config.{key} is a group; set one of its keys: {keys}.")
    return group, name


def _near(config: ConfigDict, key: str) -> str:
    """A hint at keys of the same name in other groups, or else at the most similar key."""
    keys = sorted(key for key, _ in items(config))
    named = [known for known in keys if known.rpartition(".")[2] == key.rpartition(".")[2]]
    group, _, name = key.rpartition(".")
    beside = [known.rpartition(".")[2] for known in keys if known.rpartition(".")[0] == group]
    near = named or (
        [f"{group}.{close}".lstrip(".") for close in difflib.get_close_matches(name, beside, n=1)]
        if beside else difflib.get_close_matches(key, keys, n=1))
    return f" (did you mean {' or '.join(near)}?)" if near else ""


def _groups(group: ConfigDict, prefix: str = "") -> Iterator[tuple[str, ConfigDict]]:
    """A group and every one inside of it, each with what its keys begin with."""
    yield prefix, group
    for name in group:
        if isinstance(group[name], ConfigDict):
            yield from _groups(group[name], f"{prefix}{name}.")


def _parse_free(text: str) -> Any:
    """`text` as the value it looks like; a text if it looks like none."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def _parse(text: str, kind: type | tuple[type, ...]) -> Any:
    """`text` as a value of type `kind`.

    Raises:
        ValueError, SyntaxError, TypeError, OverflowError: if it is none.
    """
    if kind is str:
        return text
    if kind == lengths.KINDS:
        if lengths.is_one(text):
            return text.strip()
        kind = float
    if kind is bool:
        return ("false", "true").index(text.lower()) == 1
    value = ast.literal_eval(text)
    if kind is tuple and isinstance(value, tuple | list):
        return tuple(value)
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        raise TypeError
    return value


def _describe(kind: type | tuple[type, ...]) -> str:
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a text",
            lengths.KINDS: lengths.ALLOWED, tuple: "a tuple in brackets",
            list: "a list in square brackets",
            type(None): "nothing until its config file gives it a type (config_dict.placeholder)",
            }[kind]


def _split(argument: str) -> list[str]:
    """The parts of `argument` between commas, where commas inside brackets do not count."""
    parts, depth, current = [], 0, ""
    for character in argument:
        depth += {"(": 1, "[": 1, ")": -1, "]": -1}.get(character, 0)
        if character == "," and depth == 0:
            parts.append(current)
            current = ""
        else:
            current += character
    return [part.strip() for part in [*parts, current] if part.strip()]
