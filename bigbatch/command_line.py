"""What the programs' command lines share: --config with its settings, and one-line errors."""

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from bigbatch.config import set_from_text

USAGE_STATUS = 2


def define_config() -> None:
    """Defines --config=file.py:preset,key=value; `--config.key=value` sets one more key."""
    config_flags.DEFINE_config_file(
        "config", None, "A config file: configs/digits.py:increase,seed=3", lock_config=True
    )


def run(main: Callable[[Sequence[str]], None]) -> None:
    """Parses the command line and calls `main`; a user's mistake is one line and status 2."""
    settings: list[tuple[str, str]] = []
    flags.FLAGS.set_default("verbosity", logging.WARNING)  # Orbax reports every step at INFO

    def parse(arguments: Sequence[str]) -> list[str]:
        rest = []
        for argument in arguments:
            key, equals, text = argument.partition("=")
            if key.startswith(("--config.", "-config.")) and equals:
                settings.append((key.partition(".")[2], text))
            else:
                rest.append(argument)
        try:
            left = flags.FLAGS(rest)
        except flags.IllegalFlagValueError as error:
            # A config file's own error comes with its traceback inside; its last line is the text.
            refuse(str(error).strip().splitlines()[-1].removeprefix("  ").split("Error: ")[-1])
        except flags.Error as error:
            refuse(str(error))
        if len(left) > 1:
            refuse(f"{left[1]!r} is no flag; settings are --config.key=value or --flag=value.")
        return left

    def checked_main(arguments: Sequence[str]) -> None:
        try:
            if settings:
                for key, text in settings:
                    set_from_text(config(), key, text)
            main(arguments)
        except (ValueError, OSError) as error:
            if not said_here(error.__traceback__):
                raise
            refuse(str(error))

    app.run(checked_main, flags_parser=parse)


def config() -> ConfigDict:
    """The config of the command line.

    Raises:
        ValueError: if none was given or its file cannot be read.
    """
    value = flags.FLAGS.config
    if not isinstance(value, ConfigDict):
        given = flags.FLAGS["config"].value
        raise ValueError(
            "--config is missing or names no readable file; write for example "
            f"--config=configs/digits.py:increase (got {given!r})."
            if given is None else
            "--config names no readable file; write for example "
            "--config=configs/digits.py:increase."
        )
    return value


def refuse(text: str) -> None:
    """Prints one line and ends the program."""
    print(f"bigbatch: {' '.join(text.split())}", file=sys.stderr, flush=True)
    sys.exit(USAGE_STATUS)


def said_here(trace: TracebackType | None) -> bool:
    """Whether an error was raised by this package itself, and not somewhere beneath it."""
    frames = traceback.extract_tb(trace)
    return bool(frames) and Path(frames[-1].filename).is_relative_to(Path(__file__).parent)


def leave(status: int, text: str = "") -> None:
    """Ends the process at once, without waiting for programs still being compiled."""
    if text:
        print(f"bigbatch: {' '.join(text.split())}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def keep_compiled_programs(folder: str) -> None:
    """Keeps compiled programs in `folder`, so that a later start of the run need not compile."""
    if folder:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
