"""How the programs here end on an error: one line, and the exit statuses of bigbatch's own."""

import contextlib
import sys
from collections.abc import Iterator

from bigbatch.job import statuses
from bigbatch.mistake import Mistake


@contextlib.contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """Ends `program` with one line for an error in the block that a user can do something about.

    The status is 2 for a mistake in what was asked, and 1 where a run failed or a file could not be
    read or written. Errors of other kinds are bugs, and pass.
    """
    try:
        yield
    except (Mistake, RuntimeError, OSError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        sys.exit(statuses.MISTAKE if isinstance(error, Mistake) else statuses.FAILED)
    except KeyboardInterrupt:
        print(f"{program}: stopped; the same command goes on from here.", file=sys.stderr)
        sys.exit(statuses.FAILED)
