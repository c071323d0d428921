"""What the programs' command lines share: --config with its settings, and one-line errors."""

import functools
import gc
import importlib.util
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

from absl import app, flags, logging
from ml_collections import ConfigDict

from bigbatch.config import set_from_text
from bigbatch.job import statuses
from bigbatch.job.processes import leave
from bigbatch.mistake import Mistake

EXAMPLE = "--config=configs/digits.py:increase"
flags.disclaim_key_flags()  # a program's --help shows --config among its own flags


def define_config() -> None:
    """Defines --config=file.py:preset,key=value; `--config.key=value` sets one more key."""
    # Not config_flags.DEFINE_config_file: it reads the settings from sys.argv by rules of its own,
    # and what it makes of a mistake is a traceback.
    if "config" not in flags.FLAGS:
        flags.DEFINE_string(
            "config", None, "file.py:preset,key=value,... as configs/digits.py:increase,seed=3; "
            "--config.key=value sets one more key."
        )
    flags.declare_key_flag("config")


def run(main: Callable[[Sequence[str]], None]) -> None:
    """Parses the command line and calls `main`; a user's mistake is one line and status 2."""
    settings: list[tuple[str, str]] = []

    def parse(arguments: Sequence[str]) -> list[str]:
        # Orbax reports every step of a save at INFO. Set, and not made the default, because absl
        # raises the verbosity to INFO after parsing wherever it is still the default.
        flags.FLAGS.verbosity = logging.WARNING
        rest, unread = [], iter(arguments)
        for argument in unread:
            key, equals, text = argument.partition("=")
            if "config" in flags.FLAGS and key.startswith(("--config.", "-config.")):
                settings.append((key.partition(".")[2], text if equals else next(unread, "")))
            else:
                rest.append(argument)
        try:
            left = flags.FLAGS(rest)
        except flags.Error as error:
            refuse(str(error))
        if len(left) > 1:
            refuse(f"{left[1]!r} is no flag; settings are --config.key=value or --flag=value.")
        return left

    def checked_main(arguments: Sequence[str]) -> None:
        # What was imported stays, and is not to be looked through for garbage between updates.
        gc.freeze()
        gc.enable()  # a program may have imported without
        try:
            for key, text in settings:
                set_from_text(config(), key, text)
            main(arguments)
        except KeyboardInterrupt:  # the second one, where training listens: it waits for nothing
            leave(statuses.INTERRUPTED, "interrupted.")
        except Mistake as mistake:
            refuse(str(mistake))
        except Exception:
            traceback.print_exc()
            leave(statuses.FAILED)  # at once: the interpreter's own end waits for compilations

    app.run(checked_main, flags_parser=parse)


def config() -> ConfigDict:
    """The config of the command line: the same object at each call.

    Raises:
        Mistake: if none was given, there is no such file, or its argument asks for what is not
            there.
    """
    if not flags.FLAGS.config:
        raise Mistake(f"--config is missing; write for example {EXAMPLE}.")
    return _load_once(flags.FLAGS.config)


def load_config(text: str, root: Path | None = None) -> ConfigDict:
    """The config that a text as that of --config names: file.py:preset,key=value,...

    Args:
        text: as "configs/digits.py:increase,seed=3".
        root: the folder that a relative path begins in; None for the working directory.

    Raises:
        Mistake: if there is no such file, or its argument asks for what is not there.
    """
    path, _, argument = text.partition(":")
    return load_file(root / path if root else path).get_config(argument)


_load_once = functools.cache(load_config)


def load_file(path: str | Path) -> ModuleType:
    """A config file, as a module with `get_config(argument)`.

    Raises:
        Mistake: if there is no such file, or no such function in it.
    """
    spec = importlib.util.spec_from_file_location("config", path)  # None if no Python file's name
    if spec is None or not Path(path).is_file():
        raise Mistake(
            f"--config names {str(path)!r}, and there is no such Python file; write for example "
            f"{EXAMPLE}."
        )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise Mistake(f"--config names {str(path)!r}, which has no function "
                         "get_config(argument).")
    return module


def refuse(text: str) -> None:
    """Prints one line and ends the program, whatever other processes of a job do."""
    leave(statuses.MISTAKE, text)
