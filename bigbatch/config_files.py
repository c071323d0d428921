"""Config files: where they are looked for, and what a text as that of --config names."""

import importlib.util
from pathlib import Path
from types import ModuleType

from ml_collections import ConfigDict

from bigbatch.mistake import Mistake

EXAMPLE = "--config=digits.py:increase"
_PACKAGE = Path(__file__).parent
# What comes along: a part of the package where it is installed, beside it in a checkout.
CONFIGS = next((folder for folder in (_PACKAGE / "configs", _PACKAGE.parent / "configs")
                if folder.is_dir()), _PACKAGE / "configs")


def load_config(text: str, root: Path | None = None) -> ConfigDict:
    """The config that a text as that of --config names: file.py:preset,key=value,...

    Args:
        text: as "digits.py:increase,seed=3".
        root: the folder that a relative path begins in; None for the working directory.

    Raises:
        Mistake: if there is no such file, or its argument asks for what is not there.
    """
    path, _, argument = text.partition(":")
    return load_file(path, root).get_config(argument)


def load_file(path: str | Path, root: Path | None = None) -> ModuleType:
    """A config file, as a module with `get_config(argument)`.

    Args:
        path: of the file. Where there is none, NAME.py and configs/NAME.py are a config that came
            along with bigbatch.
        root: the folder that a relative path begins in; None for the working directory.

    Raises:
        Mistake: if there is no such file, or no such function in it.
    """
    found = (root or Path()) / path
    if not found.is_file() and Path(path).parent in (Path(), Path("configs")):
        found = CONFIGS / found.name
    spec = importlib.util.spec_from_file_location("config", found)  # None if no Python file's name
    if spec is None or not found.is_file():
        raise Mistake(
            f"--config names {str(path)!r}, and there is no such Python file; {that_came_along()}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise Mistake(f"--config names {str(path)!r}, which has no function "
                         "get_config(argument).")
    return module


def that_came_along() -> str:
    """The end of a message: the configs that need no path."""
    names = ", ".join(sorted(file.name for file in CONFIGS.glob("*.py")))
    return f"with bigbatch came {names}; write for example {EXAMPLE}."
