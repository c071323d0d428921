"""What the commands of experiments/ share: one line for an error, and flags for every run."""

import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from bigbatch.config import base_config
from bigbatch.config.texts import set_from_text
from bigbatch.job import statuses
from bigbatch.mistake import Mistake
from bigbatch.storage import continuing
from experiments import logs


@contextlib.contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """Ends `program` with one line for an error of the block that a user can remedy.

    The status is 2 for a mistake in the command, and 1 where a run failed or a file could not be
    read or written. Errors of other kinds are bugs and are raised.
    """
    try:
        yield
    except (Mistake, RuntimeError, OSError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        sys.exit(statuses.MISTAKE if isinstance(error, Mistake) else statuses.FAILED)
    except KeyboardInterrupt:
        print(f"{program}: stopped; the same command goes on from here.", file=sys.stderr)
        sys.exit(statuses.FAILED)


def data_settings(data_dir: str) -> list[str]:
    """The flags of bigbatch.main that say where the data are; "" leaves that to the config."""
    if not data_dir:
        return []
    if "://" not in data_dir:  # runs start in the repository
        data_dir = str(Path(data_dir).expanduser().resolve())
    return [f"--config.data.dir={data_dir}"]


def hardware_settings(flags: Sequence[str]) -> list[str]:
    """The flags `--config.KEY=VALUE` for every run, of keys that change nothing that is learned.

    Raises:
        Mistake: if one has another form, another key (the curves would be others than those that
            the figures and their records name), or a value that the key does not take.
    """
    free = sorted(logs.FREE - {"seed", "data.dir"})
    for flag in flags:
        key, equals, value = flag.removeprefix("--config.").partition("=")
        if not (flag.startswith("--config.") and equals
                and continuing.is_among(key, free)):
            raise Mistake(
                f"{flag} is not known here. Every run can be given --config.KEY=VALUE for keys "
                f"that change nothing that is learned: {', '.join(free)}. --help lists the other "
                "flags.")
        set_from_text(base_config(), key, value)
    return list(flags)
