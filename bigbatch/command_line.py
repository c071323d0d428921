"""What the programs' command lines share: --config with its settings, and one-line errors."""

import functools
import gc
import sys
import traceback
from collections.abc import Callable, Sequence

from absl import app, flags, logging
from ml_collections import ConfigDict

from bigbatch import config_files
from bigbatch.config import set_from_text
from bigbatch.job import statuses
from bigbatch.job.output import unbreakable
from bigbatch.job.processes import leave
from bigbatch.mistake import Mistake

flags.disclaim_key_flags()  # a program's --help shows --config among its own flags


def define_config() -> None:
    """Defines --config=file.py:preset,key=value; `--config.key=value` sets one more key."""
    # Not config_flags.DEFINE_config_file: it reads the settings from sys.argv by rules of its own,
    # and what it makes of a mistake is a traceback.
    if "config" not in flags.FLAGS:
        flags.DEFINE_string(
            "config", None, "file.py:preset,key=value,... as digits.py:increase,seed=3; "
            "--config.key=value sets one more key."
        )
    flags.declare_key_flag("config")


def run(main: Callable[[Sequence[str]], None]) -> None:
    """Parses the command line and calls `main`; a user's mistake is one line and status 2."""
    settings: list[tuple[str, str]] = []
    sys.stderr = unbreakable(sys.stderr)  # for what libraries say there, too

    def parse(arguments: Sequence[str]) -> list[str]:
        # Libraries report their steps at INFO. Set, and not made the default, because absl raises
        # the verbosity to INFO after parsing wherever it is still the default.
        flags.FLAGS.verbosity = logging.WARNING
        rest, unread = [], iter(arguments)
        for argument in unread:
            flag, equals, text = argument.partition("=")
            if "config" not in flags.FLAGS or not flag.startswith(("--config.", "-config.")):
                rest.append(argument)
                continue
            if not equals:
                text = next(unread, "--")
                if text.startswith("--"):  # the next flag, or nothing
                    refuse(f"{flag} has no value; write {flag}=VALUE ({flag}= is the empty text).")
            settings.append((flag.partition(".")[2], text))
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
        raise Mistake(f"--config is missing; {config_files.that_came_along()}")
    return _load_once(flags.FLAGS.config)


_load_once = functools.cache(config_files.load_config)


def refuse(text: str) -> None:
    """Prints one line and ends the program, whatever other processes of a job do."""
    leave(statuses.MISTAKE, text)
