"""What it costs an update to measure the noise scale by the norms.

    python -m experiments.speed.noise_cost [--topology=SLICE,...] > RECORD.json

An update with copies of the norms' scales and biases beside one without: the seconds of the
process's own on this machine, in turns, and with --topology the estimates of that slice's compiler,
where the update also measures by devices. Prints JSON.
"""

import argparse
import json
import time
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import jax

from bigbatch.data import feed
from bigbatch.planning import compiled, topology
from bigbatch.programs.compilation import Kind, Program
from bigbatch.programs.lowering import lowering
from bigbatch.storage import caches
from bigbatch.tasks import contract
from bigbatch.update import network, noise, update
from experiments import provenance
from experiments.figures import load_config
from experiments.speed.bare import NOISE, BareUpdate, on_gpu
from experiments.speed.measure import Measurement, paired, ratios

CONFIGS = ("configs/small.py:decay,recipe.batch_size=80", "configs/cifar10.py:decay,model.width=1")
COMPILED = {  # with the ghost batches that a device takes
    "configs/cifar10.py:decay,dtype=bfloat16": 5,
    "configs/imagenet_resnet50.py:batch_8k": 4,
    "configs/language.py:bytes,dtype=bfloat16,model.width=256,data.options.length=512": 4,
}


def without_copies(net: network.Network) -> network.Network:
    """The same network, of which no update measures the noise."""
    return net._replace(copied_for=0, copied=jax.tree.map(lambda _: False, net.copied))


def noise_cost(repeats: int, short: bool) -> list[Measurement]:
    """The seconds of updates that measure over those of updates that do not."""
    found = []
    for text in CONFIGS[:1] if short else CONFIGS:
        config = load_config(f"{text},{NOISE}" + ",dtype=bfloat16" * on_gpu())
        net = network.build(config)
        rows = {"with": BareUpdate(config, net), "without": BareUpdate(config, without_copies(net))}
        times = 1 if short else 10
        seconds = paired({name: partial(row.take, times) for name, row in rows.items()}, repeats,
                         time.perf_counter if on_gpu() else time.process_time)
        found.append(Measurement(
            "the noise scale by the norms in every update", text, "<= 1.01", "x",
            ratios(*seconds.values()), seconds=seconds))
    return found


def by_compiler(text: str, slots: int, slice_name: str) -> dict[str, Any]:
    """What the compiler of a slice says of one device's update, with the noise and without."""
    found, config = topology.parse(slice_name), load_config(text)
    mesh, net = topology.make_mesh(found), network.build(config)
    fields = contract.fields_of(config, contract.task_of(config))
    resident, test = feed.resident_shapes(config, fields, mesh)
    row: dict[str, Any] = {"config": text, "slice": slice_name, "slots": slots}

    def measure(net: network.Network) -> compiled.Measured:
        lower = lowering(config, net, mesh, update.abstract_state(config, net, mesh), resident,
                         test)
        return compiled.measure(lower(Program(Kind.UPDATE, slots)), found.kind, mesh,
                                Path(caches.folder("plans")).expanduser())

    row["with"] = measure(net)._asdict()
    with mock.patch.object(update, "_noise", lambda *_: noise.Measured(None, None, None)):
        row["without"] = measure(without_copies(net))._asdict()
    for key in ("seconds", "temporary_bytes", "accessed_bytes"):
        row[f"{key}_ratio"] = row["with"][key] / row["without"][key]
    return row


def main() -> None:
    """Measures what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--topology", default="", help="slices, with commas between")
    parser.add_argument("--only", default="", help="a word of the configs to compile")
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    record = provenance.describe(provenance.command_line("experiments.speed.noise_cost"))
    if options.topology:
        topology.compile_elsewhere()
        record["compiled"] = [
            by_compiler(text, slots, name) for name in options.topology.split(",")
            for text, slots in COMPILED.items() if options.only in text]
    else:
        record["measurements"] = [row._asdict() for row in noise_cost(options.repeats, False)]
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
