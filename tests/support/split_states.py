"""States that are split over devices in several ways, and a job of two processes that saves them.

    python -m tests.support.split_states WORKDIR PORT PROCESS LONG

restores, as process PROCESS of two, the checkpoint at 1, saves at 2, and then at 3, where the
second process is killed while it writes. LONG numbers are in the longest array.
"""

import os
import re
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bigbatch.job import processes, statuses
from bigbatch.job.output import say
from bigbatch.storage import arrays, bucket, checkpoint, parts, writing

SMALL_CHUNK = 1 << 20  # bytes: some of each are in memory beside what is read
WAIT_SECONDS = 3  # of the first process for the second one's part
# The axes of a mesh are "data" and "shards".
SHARDINGS = {
    "flat": P(("data", "shards")), "rows": P(("data", "shards")), "columns": P(None, "shards"),
    "whole": P(), "both": P("data", "shards"), "second": P("shards"), "count": P(),
}


class State(NamedTuple):
    """As a run's state, a named tuple with an empty field."""

    params: Mapping[str, Any]
    opt_state: tuple
    average: None = None


def shapes(long: int) -> dict[str, tuple[int, ...]]:
    """Of the arrays, all of which hold 0, 1, 2, ..."""
    return {"flat": (long,), "rows": (16, 3), "columns": (3, 16), "whole": (5, 7), "both": (8, 8),
            "second": (8, 3), "count": ()}


def mesh(*lengths: int) -> Mesh:
    """A mesh of the first devices."""
    devices = np.array(jax.devices()[: np.prod(lengths)])
    return Mesh(devices.reshape(lengths), ("data", "shards"))


def like(over: Mesh | None, long: int) -> State:
    """The shapes of a state that is split over a mesh; for None without shardings."""
    flat = {name: jax.ShapeDtypeStruct(shape, np.uint32,
                                       sharding=over and NamedSharding(over, SHARDINGS[name]))
            for name, shape in shapes(long).items()}
    count = flat.pop("count")
    return State(flat, ((), ({"count": count},)))


def made(over: Mesh | None, long: int) -> State:
    """A state split over a mesh, of which each process makes its own pieces; for None in NumPy."""
    def one(leaf: jax.ShapeDtypeStruct) -> Any:
        if leaf.sharding is None:
            return numbers(leaf.shape)
        return jax.make_array_from_callback(
            leaf.shape, leaf.sharding, lambda index: numbers(leaf.shape, index))

    return jax.tree.map(one, like(over, long))


def numbers(shape: tuple[int, ...], index: tuple[slice, ...] = ()) -> np.ndarray:
    """The part at `index` of an array that holds 0, 1, 2, ..., of which no more is made."""
    if not shape:
        return np.zeros((), np.uint32)
    along = [np.arange(*one.indices(length), dtype=np.uint32) for one, length
             in zip(index or [slice(None)] * len(shape), shape, strict=True)]
    return sum(places * np.uint32(np.prod(shape[axis + 1 :])) for axis, places
               in enumerate(np.ix_(*along)))


def check(state: State) -> None:
    """Asserts that the pieces which this process holds of a state are those of `made`."""
    for array in jax.tree.leaves(state):
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(shard.data, numbers(array.shape, shard.index))


def main(workdir: str, port: str, process: str, long: str) -> None:
    """See above."""
    processes.join(f"127.0.0.1:{port}", 2, int(process), dead_peer_seconds=60)
    arrays.CHUNK_BYTES, arrays.IN_FLIGHT_BYTES = SMALL_CHUNK, 4 * SMALL_CHUNK
    over, long = mesh(2, 4), int(long)
    with bucket.opened(workdir) as (folder, mirror):
        if mirror and jax.process_index() == 0:
            mirror._lease = Held()
        found = checkpoint.find_newest(folder, mirror, in_job=True)
        assert found.run["examples_seen"] == 1, found
        before = peak_of_memory(anew=True)
        state = checkpoint.restore(found.path, like(over, long), mirror)
        say(f"restoring took {peak_of_memory() - before} MB")
        check(state)

        def save(examples_seen: int) -> None:
            run = {"examples_seen": examples_seen}
            writing.save(folder, state, run, 9, set(), mirror).result()

        save(2)
        parts.PART_SECONDS = WAIT_SECONDS
        if jax.process_index() and mirror:
            parts.tell = lambda *_: die()  # its part is in the bucket
        elif jax.process_index():
            arrays._loads = dying(arrays._loads)
        try:
            save(3)
        except writing.ProcessLost as error:
            processes.leave(statuses.AGAIN, str(error))


def peak_of_memory(anew: bool = False) -> int:
    """MB of this process at the most, since its start or since this was asked for anew."""
    if anew:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) // 1024


def dying(loads: Any) -> Any:
    """A generator like this one, which is killed after the first load was written."""
    def one_load(blocks: Any) -> Any:
        yield next(loads(blocks))
        die()

    return one_load


def die() -> None:
    """Ends this process as a crash of its machine would."""
    os.kill(os.getpid(), signal.SIGKILL)


class Held:
    """Stands for the lease of a workdir in a bucket."""

    def check(self) -> None:
        """It is held."""

    def renew(self) -> None:
        """It is held."""


if __name__ == "__main__":
    main(*sys.argv[1:])
