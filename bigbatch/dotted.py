"""Finds functions and classes by dotted path, so that models and data sets need no registration."""

import difflib
import importlib
from collections.abc import Callable
from typing import Any

from bigbatch.mistake import Mistake


def is_dotted(name: str) -> bool:
    """Whether `name` is a dotted path, such as 'package.module.name'; nothing is imported."""
    parts = name.split(".")
    return len(parts) > 1 and all(part.isidentifier() for part in parts)


def resolve_task(dotted: str, what: str) -> Any:
    """The module that `dotted` names, or an object in a module.

    Args:
        dotted: 'module', 'package.module' or 'package.module.name'.
        what: see `resolve`.

    Raises:
        Mistake: see `resolve`; what it names may be of any kind.
    """
    if all(part.isidentifier() for part in dotted.split(".")):
        try:
            return importlib.import_module(dotted)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{dotted}.".startswith(f"{error.name}."):
                raise
    return _named(dotted, what)


def resolve(dotted: str, what: str) -> Callable:
    """Imports the function or class that `dotted` names.

    Args:
        dotted: 'package.module.name'.
        what: the name of the setting, for messages, such as "config.network".

    Raises:
        Mistake: if `dotted` is no dotted path, its module or name does not exist, or what it names
            is not callable. Exceptions inside the imported module pass through.
    """
    named = _named(dotted, what)
    if not callable(named):
        raise Mistake(
            f"{what} is {dotted!r}, which is {type(named).__name__} {dotted.rpartition('.')[2]!r} "
            "and cannot be called."
        )
    return named


def _named(dotted: str, what: str) -> Any:
    """What `dotted` names in its module, whatever it is; raises Mistake as `resolve` does."""
    if not is_dotted(dotted):
        raise Mistake(
            f"{what} is {dotted!r}; it must be a dotted path, such as 'package.module.name'."
        )
    path, name = dotted.rsplit(".", 1)
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{path}.".startswith(f"{error.name}."):
            raise
        raise Mistake(
            f"{what} is {dotted!r}, but there is no module {error.name!r}: it must be in the "
            "current folder, in a folder of PYTHONPATH, or installed."
        ) from None
    if not hasattr(module, name):
        close = difflib.get_close_matches(name, dir(module), n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise Mistake(f"{what} is {dotted!r}, but module {path!r} has no {name!r}.{hint}")
    return getattr(module, name)
