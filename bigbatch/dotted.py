"""Objects of the user's own, named by dotted path: models and data sets need no registration."""

import difflib
import importlib
from collections.abc import Callable

from bigbatch.mistake import Mistake


def is_dotted(name: str) -> bool:
    """Whether `name` has the form of a dotted path, 'package.module.name'."""
    parts = name.split(".")
    return len(parts) > 1 and all(part.isidentifier() for part in parts)


def resolve(dotted: str, what: str) -> Callable:
    """Imports the function or class that `dotted` names.

    Args:
        dotted: 'package.module.name'.
        what: where the path was given, for the message, as "config.network".

    Raises:
        Mistake: if it is no dotted path, or a part of it is missing or cannot be called. What
            goes wrong inside the imported module is that module's own error and passes through.
    """
    if not is_dotted(dotted):
        raise Mistake(
            f"{what} is {dotted!r}; it must be a dotted path, as 'package.module.name'."
        )
    path, name = dotted.rsplit(".", 1)
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{path}.".startswith(f"{error.name}."):
            raise
        raise Mistake(
            f"{what} is {dotted!r}, but there is no module {error.name!r}: it must be importable, "
            "so in the current folder, in a folder of PYTHONPATH, or installed."
        ) from None
    if not hasattr(module, name):
        close = difflib.get_close_matches(name, dir(module), n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise Mistake(f"{what} is {dotted!r}, but module {path!r} has no {name!r}.{hint}")
    found = getattr(module, name)
    if not callable(found):
        raise Mistake(
            f"{what} is {dotted!r}, which is {type(found).__name__} {name!r} and cannot be called."
        )
    return found
