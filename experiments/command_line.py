"""How the programs here end on an error: one line, and the exit statuses of bigbatch's own."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from bigbatch import command_line
from bigbatch.job import statuses


@contextlib.contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """Ends `program` with one line for an error in the block that a user can do something about.

    The status is 2 for a mistake in what was asked, a ValueError of bigbatch's or of this
    package's, and 1 for anything else. Errors of other kinds are bugs, and pass.
    """
    try:
        yield
    except (ValueError, RuntimeError, OSError) as error:
        trace = error.__traceback__
        if isinstance(error, ValueError) and not (
            command_line.said_here(trace) or command_line.said_here(trace, Path(__file__).parent)
        ):
            raise
        print(f"{program}: {error}", file=sys.stderr)
        mistake = isinstance(error, ValueError)
        sys.exit(statuses.MISTAKE if mistake else statuses.FAILED)
    except KeyboardInterrupt:
        print(f"{program}: stopped; the same command goes on from here.", file=sys.stderr)
        sys.exit(statuses.FAILED)
