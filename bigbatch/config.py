"""Every key of a config with its default, how a text sets one, and what a config means.

A config file has `get_config(argument)` and begins with `base_config()`; the argument is the text
after the colon in `--config=file.py:preset,key=value`.
"""

import ast
import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict, config_dict

from bigbatch import schedule
from bigbatch.mistake import Mistake
from bigbatch.schedule import due
from bigbatch.schedule.layout import Layout, make_layout

DTYPES = ("float32", "bfloat16", "float64")
OPTIMIZERS = ("momentum", "nesterov", "sgd", "adam")
WEIGHT_DECAY_ON = ("all", "no_norms", "no_norms_or_biases")
CROP_STYLES = ("goyal", "inception", "none")
RESAMPLE = ("bicubic", "bilinear")
ON_BAD_IMAGE = ("stop", "skip")
# What version 0.1 had in configs/small.py: {its dotted path: the one of now}.
MOVED = {
    "configs.small.half_resolution": "bigbatch.data.smaller.half_resolution",
    "configs.small.some_digits": "bigbatch.data.smaller.some_digits",
}
TINY = math.ulp(0.0)  # the least number over 0
# What a key's value must do, and what that means: at least the one number and below the other.
RANGES = {
    **{key: (f"be {least} or more", least, math.inf) for key, least in (
        ("ghost_size", 1), ("max_per_device_batch", 1), ("microbatches", 0),
        ("eval_batch_size", 1), ("keep_checkpoints", 1), ("data.num_classes", 2),
        ("data.train_examples", 1), ("data.test_examples", 1), ("data.image_size", 1),
        ("data.augment.pad", 0), ("data.augment.crop", 0), ("data.workers", 0),
        ("data.read_threads", 1))},
    **{key: ("be a finite number over 0", TINY, math.inf) for key in (
        "log_every_epochs", "eval_every_epochs", "checkpoint_every_epochs", "optimizer.epsilon")},
    "seed": ("be 0 or more and below 2**32", 0, 2**32),
    "data.eval_share": ("lie in (0, 1]", TINY, math.nextafter(1.0, 2.0)),
    "optimizer.weight_decay": ("be a finite number, 0 or more", 0, math.inf),
    "label_smoothing": ("lie in [0, 1)", 0, 1),
    "optimizer.beta2": ("lie in [0, 1)", 0, 1),
}
MAY_BE_NONE = ("scale_up.momentum", "limits.max_batch_size", "limits.granularity")


def base_config() -> ConfigDict:
    """A config with every key there is. Families set what they need; nothing reads a default."""
    config = ConfigDict()
    config.seed = 0  # initialisation, order, augmentation and dropout all follow from it
    config.dtype = "float32"  # to compute in: float32, bfloat16, float64
    config.ghost_size = 128  # examples a batch statistic is taken over

    config.strategy = "increase"  # how falls of the noise are paid: see schedule.plan_phases
    config.hybrid_falls = 1  # for "hybrid": so many falls by batch, the rest by rate
    config.recipe = ConfigDict({
        "learning_rate": 0.1,
        "batch_size": 128,
        "momentum": 0.9,
        "epochs": 1.0,
        "falls": (),  # ((epoch, factor), ...): where the noise scale is divided by the factor
        "warmup_epochs": 0.0,
        "warmup_learning_rate": 0.0,
    })
    config.scale_up = ConfigDict({
        "learning_rate": 1.0,  # the rate times this, the batch in proportion
        "momentum": config_dict.placeholder(float),  # raised to this, the batch in proportion
    })
    config.limits = ConfigDict({
        "max_batch_size": config_dict.placeholder(int),
        "granularity": config_dict.placeholder(int),  # batches are multiples; unset: ghost_size
    })

    config.optimizer = ConfigDict({
        "name": "momentum",  # momentum, nesterov, sgd, adam
        "weight_decay": 0.0,
        "weight_decay_on": "all",  # all, no_norms, no_norms_or_biases
        "decoupled": False,  # True: weights shrink by rate x decay; False: added to the gradient
        "beta2": 0.999,  # Adam's; its beta1 is the recipe's momentum
        "epsilon": 1e-8,  # Adam's
    })
    config.label_smoothing = 0.0

    config.network = "bigbatch.models.wide_resnet.WideResNet"  # dotted path of a model function
    config.model = ConfigDict()  # its keyword arguments

    config.data = ConfigDict({
        "name": "digits",  # digits, a TFDS name, or the dotted path of a function giving arrays
        "dir": "",  # TFDS data_dir; empty: TFDS's own default
        "train_split": "train",
        "test_split": "test",
        "train_examples": 1437,  # N; checked when the data is loaded
        "test_examples": 360,
        "num_classes": 10,
        "image_size": 8,  # side of the images the network gets
        "mean": (0.0,),  # per channel, on the scale 0 to 255
        "std": (255.0,),
        "streaming": False,  # False: the data set lives in device memory as uint8
        "augment": {"pad": 0, "crop": 0, "flip": False},  # pixels reflected; side cut out (0: all)
        # Only read where streaming is on.
        "crop_style": "goyal",  # goyal, inception, none: see bigbatch/data/decode.py
        "eval_share": 0.875,  # of the sides, around the centre, that evaluation sees
        "resample": "bicubic",  # bicubic, bilinear
        # stop, skip (and count: it weighs nothing, but is black in its ghost batch's statistics)
        "on_bad_image": "stop",
        "workers": 0,  # processes that decode; 0: threads of this one
        "read_threads": 2,  # in each of them
    })

    # None of the keys below changes what is learned.
    config.max_per_device_batch = 1024  # examples one pass takes; larger parts are accumulated
    config.microbatches = 0  # passes an update by hand; 0: as few as max_per_device_batch allows
    config.eval_batch_size = 500  # on each device
    config.log_every_epochs = 0.1
    config.eval_every_epochs = 1.0
    config.checkpoint_every_epochs = 10.0
    config.keep_checkpoints = 2  # the newest; those at phase boundaries stay too
    config.tensorboard = True
    config.lock()  # a family's misspelt key is an error, not one more key
    config.model.unlock()
    return config


def from_argument(
    config: ConfigDict,
    argument: str,
    presets: Mapping[str, Mapping[str, Any]],
    options: Mapping[str, Mapping[str, Mapping[str, Any] | Callable]] | None = None,
) -> ConfigDict:
    """`config` with a preset, then `key=value` settings, in the order of the text.

    Args:
        config: with the family's common settings; changed in place, and locked.
        argument: "preset", "preset,key=value,...", or "" for the first preset.
        presets: settings (dotted key to value) by name.
        options: families of settings chosen by name, as `optimizer=adam`; not keys of the config.
            Settings, or a function that gives them for the config so far.

    Raises:
        Mistake: for an unknown preset, option, key, or a value of the wrong kind.
    """
    options = options or {}
    config.lock()
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
    """Sets the dotted `key` from a command line's text, keeping the type it has.

    Raises:
        Mistake: if there is no such key, or the text is no value of its type.
    """
    group, name = _find(config, key)
    kind = group.get_type(name)
    try:
        group[name] = None if text == "None" and key in MAY_BE_NONE else _parse(text, kind)
    except (ValueError, SyntaxError, TypeError):
        raise Mistake(
            f"config.{key} takes {_describe(kind)}{' or None' * (key in MAY_BE_NONE)} (it is "
            f"{group[name]!r}), not {text!r}."
        ) from None


def saved_config(run: Mapping[str, Any]) -> ConfigDict:
    """The config that a run was saved with, with every key that this version has.

    A key that the version which saved it had not yet has its default: what runs did without it. So
    a new key ends no old run. What was moved in the package is named by its place of now.

    Args:
        run: `config`, and the `version` that saved it, which 0.1 did not note.
    """
    filled = base_config()
    with filled.unlocked():
        _fill(filled, run["config"])
        wide_resnet = filled.network == "bigbatch.models.wide_resnet.WideResNet"
        if "version" not in run and wide_resnet and "same_padding" not in filled.model:
            filled.model.same_padding = True  # version 0.1 had no other
        filled.data.name = MOVED.get(filled.data.name, filled.data.name)
    return filled


def _fill(config: ConfigDict, saved: Mapping[str, Any]) -> None:
    for key, value in saved.items():
        if isinstance(value, Mapping) and key in config and key != "model":
            _fill(config[key], value)
        else:
            config[key] = ConfigDict(value) if isinstance(value, Mapping) else value


def make_recipe(config: ConfigDict) -> schedule.Recipe:
    """The recipe a config states, scaled up as it says.

    Raises:
        Mistake: where a value is of no use; see `schedule`.
    """
    falls = config.recipe.falls
    try:
        falls = tuple((float(epoch), float(factor)) for epoch, factor in falls)
    except (TypeError, ValueError):
        raise Mistake(
            f"recipe.falls is {falls!r}; it must be pairs of (epoch, factor), as ((60, 5), "
            "(120, 5))."
        ) from None
    recipe = schedule.Recipe(
        **{**config.recipe.to_dict(), "falls": falls}, examples=config.data.train_examples
    )
    granularity = config.limits.granularity or config.ghost_size
    if (config.scale_up.learning_rate, config.scale_up.momentum) == (1.0, None):
        return recipe  # so that a batch that does not fit is refused under its own name
    return schedule.scale_up(
        recipe, config.scale_up.learning_rate, config.scale_up.momentum, granularity
    )


def make_limits(config: ConfigDict) -> schedule.Limits:
    """The limits a config sets on the batch."""
    return schedule.Limits(**config.limits.to_dict(), ghost_size=config.ghost_size)


def make_phases(config: ConfigDict) -> tuple[schedule.Phase, ...]:
    """The phases of a config.

    Raises:
        Mistake: where no such schedule exists.
    """
    return schedule.plan_phases(
        make_recipe(config), config.strategy, make_limits(config), config.hybrid_falls
    )


def make_layouts(
    config: ConfigDict, phases: Sequence[schedule.Phase], devices: int
) -> list[Layout]:
    """How each phase's ghost batches are assigned to `devices`.

    Raises:
        Mistake: if a ghost batch does not fit into a pass.
    """
    return [
        make_layout(phase.batch_size, config.ghost_size, devices,
                           config.max_per_device_batch, config.microbatches)
        for phase in phases
    ]


def make_due(config: ConfigDict, total: int) -> Callable[[str, int, int], bool]:
    """What is due when, by the config's `..._every_epochs`; see `schedule.due.make_due`.

    Args:
        config: of the run.
        total: its examples.
    """
    every = {what: config[f"{what}_every_epochs"] for what in ("log", "eval", "checkpoint")}
    return due.make_due(every, config.data.train_examples, total)


def check(config: ConfigDict) -> None:
    """Refuses values that nothing further down could make sense of.

    Raises:
        Mistake: one line with the key, its value and what is allowed.
    """
    for key, allowed in (
        ("dtype", DTYPES),
        ("strategy", schedule.STRATEGIES),
        ("optimizer.name", OPTIMIZERS),
        ("optimizer.weight_decay_on", WEIGHT_DECAY_ON),
        ("data.crop_style", CROP_STYLES),
        ("data.resample", RESAMPLE),
        ("data.on_bad_image", ON_BAD_IMAGE),
    ):
        group, name = _find(config, key)
        if group[name] not in allowed:
            raise Mistake(
                f"config.{key} is {group[name]!r}; allowed are {', '.join(allowed)}."
            )
    for key, (allowed, least, below) in RANGES.items():
        group, name = _find(config, key)
        if not least <= group[name] < below:
            raise Mistake(f"config.{key} is {group[name]}; it must {allowed}.")
    if config.optimizer.name == "adam" and config.scale_up.momentum is not None:
        raise Mistake(
            f"config.scale_up.momentum is {config.scale_up.momentum:g}, but Adam averages the "
            "gradients with its first beta, so a larger one does not lengthen the steps and the "
            "batch cannot grow with it; leave it None, or use optimizer.name=momentum."
        )
    momentum = make_recipe(config).momentum
    if config.optimizer.name == "sgd" and momentum:
        raise Mistake(
            f"the momentum is {momentum:g}, but config.optimizer.name is 'sgd', which has none: "
            "set recipe.momentum=0 or optimizer.name=momentum."
        )


def _set_all(config: ConfigDict, settings: Mapping[str, Any]) -> None:
    for key, value in settings.items():
        group, name = _find(config, key)
        group[name] = value


def _choose(what: str, name: str, choices: Mapping[str, Any]) -> Any:
    if name not in choices:
        raise Mistake(f"{what} {name!r} is unknown; allowed are {', '.join(choices)}.")
    return choices[name]


def _find(config: ConfigDict, key: str) -> tuple[ConfigDict, str]:
    """The group that holds the dotted `key`, and the key's last part."""
    group = config
    *path, name = key.split(".")
    for depth, part in enumerate([*path, name]):
        if not isinstance(group, ConfigDict) or part not in group:
            parent = ".".join(["config", *key.split(".")[:depth]])
            if not isinstance(group, ConfigDict):
                raise Mistake(f"config.{key} is unknown: {parent} is a value, not a group.")
            raise Mistake(
                f"config.{key} is unknown{_near(config, key)}; {parent} has "
                f"{', '.join(sorted(group))}."
            )
        if depth < len(path):
            group = group[part]
    if isinstance(group[name], ConfigDict):
        raise Mistake(
            f"config.{key} is a group; set one of its keys: "
            f"{', '.join(f'{key}.{inner}' for inner in sorted(group[name]))}."
        )
    return group, name


def _near(config: ConfigDict, key: str) -> str:
    """A hint at the key that was probably meant: the same name in another group, or a near miss."""
    keys = _dotted_keys(config)
    named = [known for known in keys if known.rpartition(".")[2] == key.rpartition(".")[2]]
    near = named or difflib.get_close_matches(key, keys, n=1)
    return f" (did you mean {' or '.join(near)}?)" if near else ""


def _dotted_keys(group: ConfigDict, prefix: str = "") -> list[str]:
    keys = []
    for name in sorted(group):
        inner = isinstance(group[name], ConfigDict)
        keys += _dotted_keys(group[name], f"{prefix}{name}.") if inner else [prefix + name]
    return keys


def _parse(text: str, kind: type) -> Any:
    """`text` as a value of `kind`."""
    if kind is str:
        return text
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


def _describe(kind: type) -> str:
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a text",
            tuple: "a tuple in brackets", list: "a list in square brackets",
            type(None): "nothing until its config file gives it a type (config_dict.placeholder)",
            }[kind]


def _split(argument: str) -> list[str]:
    """The argument cut at its commas, but not at those inside brackets."""
    parts, depth, current = [], 0, ""
    for character in argument:
        depth += {"(": 1, "[": 1, ")": -1, "]": -1}.get(character, 0)
        if character == "," and depth == 0:
            parts.append(current)
            current = ""
        else:
            current += character
    return [part.strip() for part in [*parts, current] if part.strip()]
