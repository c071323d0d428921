"""How long a save of a large state, split over devices, keeps the loop waiting.

    XLA_FLAGS=--xla_force_host_platform_device_count=2 python -m experiments.speed.saves GIGABYTES

An artificial state in float32, and an update that reads and writes every number of it and computes
nothing, which is the shortest that there can be. What the first update after a save takes longer is
counted as waiting too. The memory for the copies is made before, as a run does it in the background
from its start on ("room"); --without_room leaves this out. Prints one JSON object. Needs twice the
state's memory, and twice as much on the disk of $TMPDIR.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from bigbatch.job.devices import AXIS, make_mesh
from bigbatch.storage import checkpoint, writing
from experiments import provenance
from experiments.figures import REPOSITORY
from experiments.markdown_table import markdown_table

ARRAY = 1 << 26  # numbers of each array: 256 MiB
UPDATES = 5
RECORD = REPOSITORY / "experiments/records/saves.json"  # what the command printed, a list


def measure(gigabytes: float, count: int, with_room: bool) -> dict[str, Any]:
    """Seconds of an update, and of each save: its call, the update after it, and all together.

    Args:
        gigabytes: of the state.
        count: of the saves.
        with_room: whether their memory is made before.
    """
    mesh = make_mesh()
    split = jax.NamedSharding(mesh, P(AXIS))
    begin = jax.jit(lambda: jnp.ones((ARRAY,)), out_shardings=split)
    state = {f"array{number}": begin() for number in range(round(gigabytes * 1e9 / 4 / ARRAY))}
    update = jax.jit(lambda state: jax.tree.map(lambda array: array * 0.5 + 1, state),
                     donate_argnums=0)

    def updated() -> float:
        nonlocal state
        began = time.perf_counter()
        state = jax.block_until_ready(update(state))
        return time.perf_counter() - began

    began = time.perf_counter()
    if with_room:
        writing.make_room(state).result()
    room = time.perf_counter() - began
    updated()
    alone = statistics.median(updated() for _ in range(UPDATES))
    saves = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(count):
            began = time.perf_counter()
            saving = writing.save(Path(folder), state, {"examples_seen": number}, 1, set())
            call = time.perf_counter() - began
            after = updated()
            saving.result()
            saves.append({"call": call, "update_after": after,
                          "waiting": call + max(0.0, after - alone),
                          "written": time.perf_counter() - began})
        if faults := checkpoint.faults_of(checkpoint.folder(Path(folder), number)):
            raise RuntimeError(faults)
    size = sum(array.nbytes for array in state.values()) / 1e9
    return {"gigabytes": size, "devices": mesh.size, "room": room, "update": alone, "saves": saves}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line of Markdown for each time that the command was given, with seconds."""
    lines = []
    for row in rows:
        found = row["seconds"]
        first, *later = (f"{save['waiting']:.2f}" for save in found["saves"])
        room = f"{found['room']:.0f}" if found["room"] > 1e-3 else "not made before"
        written = ", ".join(f"{save['written']:.0f}" for save in found["saves"])
        lines.append([f"{found['gigabytes']:.1f}", room, f"{found['update']:.2f}", first,
                      ", ".join(later), written, str(row["load"])])
    return markdown_table(["GB", "memory made in", "an update", "the first save waits",
                           "later ones", "written in", "load"], lines)


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("gigabytes", type=float)
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--without_room", action="store_true")
    options = parser.parse_args()
    described = provenance.describe(provenance.command_line("experiments.speed.saves"))
    seconds = measure(options.gigabytes, options.saves, not options.without_room)
    described["load"] = round(os.getloadavg()[0], 1)  # of the machine, at the end
    print(json.dumps(described | {"seconds": seconds}, indent=1))


if __name__ == "__main__":
    main()
