"""Config files: where they are looked for, and what a text as that of --config names.

The config.json of a workdir is one too: it holds the config that the run has now.
"""

import importlib.util
import json
import traceback
from pathlib import Path
from types import ModuleType

from ml_collections import ConfigDict
from ml_collections.config_dict import config_dict

from bigbatch.config import from_argument, refusal, saved_config
from bigbatch.mistake import Mistake

EXAMPLE = "--config=digits.py:increase"
_PACKAGE = Path(__file__).parent
# What comes along: a part of the package where it is installed, beside it in a checkout.
CONFIGS = next((folder for folder in (_PACKAGE / "configs", _PACKAGE.parent / "configs")
                if folder.is_dir()), _PACKAGE / "configs")


def load_config(text: str, root: Path | None = None) -> ConfigDict:
    """The config that a text as that of --config names: file.py:preset,key=value,...

    Args:
        text: as "digits.py:increase,seed=3", or "DIR/config.json:key=value" for that of a run.
        root: the folder that a relative path begins in; None for the working directory.

    Raises:
        Mistake: if there is no such file, its argument asks for what is not there, or it sets a
            key that there is not, or to a value of another type.
    """
    path, _, argument = text.partition(":")
    if path.endswith(".json"):
        return from_argument(_of_run((root or Path()) / path), argument, {"as it was": {}})
    get_config = load_file(path, root).get_config
    try:
        return get_config(argument)
    except (AttributeError, KeyError, TypeError) as error:
        mistake = _about_a_key(error)
        if mistake is None:
            raise
    raise mistake


def _of_run(path: Path) -> ConfigDict:
    """The config in the config.json of a run's workdir."""
    try:
        return saved_config(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        told = f"--config names {str(path)!r}, which cannot be read: {error.strerror}."
        raise Mistake(told) from None
    except (ValueError, KeyError, TypeError):
        raise Mistake(f"--config names {str(path)!r}, which is no config.json of a run.") from None


def _about_a_key(error: Exception) -> Mistake | None:
    """The mistake of a line that named a key, if that is what a config refused; or else None."""
    frames = list(traceback.walk_tb(error.__traceback__))
    inside = [frame for frame, _ in frames if frame.f_code.co_filename == config_dict.__file__]
    if not inside or inside[-1] is not frames[-1][0]:  # not raised by a config
        return None
    locals_ = inside[-1].f_locals
    group, name = locals_.get("self"), locals_.get("attribute", locals_.get("key"))
    held = [value for frame, _ in frames for value in frame.f_locals.values()
            if isinstance(value, ConfigDict)]
    told = refusal(held, group, name, locals_.get("value"))
    file, line = next((frame.f_code.co_filename, line) for frame, line in reversed(frames)
                      if frame not in inside)
    return Mistake(f"{file}:{line}: {told}") if told else None


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
