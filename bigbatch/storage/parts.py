"""How the first process learns that the others have written their parts of a checkpoint.

Each tells it once, by JAX's key-value store, and waits for nothing. The first process waits in the
save's thread and not in the loop, and no longer than `PART_SECONDS`.
"""

import itertools
import json
import time
from collections.abc import Mapping, Sequence

import jax

from bigbatch.job.jax_private import job_state

# From when its own part is written. A process that died is noticed earlier, by JAX.
PART_SECONDS = 600

_saves = itertools.count()


class Lost(OSError):
    """A process of the job has not written its part."""


def next_save() -> str:
    """A name for a save. All processes ask for the same names, as all make the same saves."""
    return f"bigbatch/save/{next(_saves)}"


def tell(save: str, files: Mapping[str, str] | None, failure: str = "") -> None:
    """Tells the first process that this one has written its part.

    Args:
        save: the name of the save.
        files: the checksums of its files, by their paths in the checkpoint; None if it failed.
        failure: why it failed, on one line.
    """
    told = json.dumps({"failure": failure} if files is None else {"files": files})
    job_state.client.key_value_set(f"{save}/{jax.process_index()}", told)


def gather(save: str, processes: Sequence[int]) -> dict[str, str]:
    """Waits until `processes` have written their parts, and returns the checksums of their files.

    Raises:
        Lost: if one does not within `PART_SECONDS`, or JAX has noticed that one died.
        OSError: if one could not.
    """
    until, files = time.monotonic() + PART_SECONDS, {}
    for process in processes:
        milliseconds = max(1, int(1000 * (until - time.monotonic())))
        try:
            told = job_state.client.blocking_key_value_get(f"{save}/{process}", milliseconds)
        except jax.errors.JaxRuntimeError:
            raise Lost(f"process {process} of the job has not written its part, and was waited for "
                       f"at most {PART_SECONDS} s") from None
        told = json.loads(told)
        if "failure" in told:
            raise OSError(f"process {process} of the job could not write its part: "
                          f"{told['failure']}")
        files |= told["files"]
        job_state.client.key_value_delete(f"{save}/{process}")
    return files
