"""Errors of the programs in experiments/: one line, and the exit statuses of bigbatch itself."""

import contextlib
import sys
from collections.abc import Iterator

from bigbatch.job import statuses
from bigbatch.mistake import Mistake


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
