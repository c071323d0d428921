"""What the exit statuses of a job's processes say together (see bigbatch/job/statuses.py)."""

from collections.abc import Iterable

import repository  # noqa: F401  (makes the package importable)

from bigbatch.job.statuses import (  # noqa: F401  (the scripts read them here)
    ABORTED,
    AGAIN,
    FAILED,
    FINISHED,
    INTERRUPTED,
    LOST,
    MISTAKE,
    STOPPED_AFTER_PHASE,
    SUCCESS,
)


def of_job(statuses: Iterable[int]) -> int:
    """The one status of a job.

    Where processes differ the cause has to be found: a mistake is one on every host; one process
    that was killed makes the others fail, or end with 42; one that failed by itself makes them end
    with 42 too, and would do so again; and any of these outweighs processes that ended in peace.

    Args:
        statuses: of the processes; 128 + n for one ended by signal n.
    """
    found = set(statuses)
    if MISTAKE in found:
        return MISTAKE
    causes = found - {ABORTED}
    if killed := {status for status in causes if status > 128}:
        return max(killed)
    if failed := causes - {AGAIN, *SUCCESS}:
        return max(failed)
    return AGAIN if AGAIN in found else max(found)


def wants_restart(status: int) -> bool:
    """Whether the same command, started again, goes on: saved and left, killed, or lost."""
    return status == AGAIN or status > 128
