"""What it takes an accelerator's compiler to compile an update of ours, and one of Flax's example.

    python -m experiments.speed.compile_time [--slice=v2-8] [--repeats=3] > RECORD.json

Compiles ResNet-50's update and the step of Flax's ImageNet example (see by_compiler.py) in turns
for a slice that is not here, and prints as JSON the seconds of processor time of each. Nothing is
kept or read from a cache.
"""

import argparse
import json
import time
from functools import partial

from bigbatch.planning import compiled, topology
from experiments import provenance
from experiments.command_line import one_line_errors
from experiments.speed.by_compiler import FLAX, IMAGES, WHOLE, Case, lower
from experiments.speed.measure import Measurement, beside


def compile_time(slice_name: str, repeats: int) -> Measurement:
    """The processor time of compiling our update, over that of compiling Flax's step."""
    found = topology.parse(slice_name)
    mesh = topology.make_mesh(found)
    # A program that was lowered is compiled once; `beside` calls each once more, to warm up.
    lowered = {work: [lower(Case("ResNet-50", slice_name, IMAGES["ResNet-50"][0], work), mesh)
                      for _ in range(repeats + 1)] for work in (WHOLE, FLAX)}

    def compile_next(work: str) -> None:
        compiled.measure(lowered[work].pop(), found.kind, mesh, None)

    return beside(
        "compile time beside Flax's ImageNet example, processor time",
        f"ResNet-50 for {slice_name}, 32 images a device", "<= 1.0",
        {work: partial(compile_next, work) for work in lowered}, repeats, time.process_time)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--slice", default="v2-8")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with one_line_errors("experiments.speed.compile_time"):
        topology.compile_elsewhere()
        record = provenance.describe(provenance.command_line("experiments.speed.compile_time"))
        row = compile_time(options.slice, options.repeats)
        print(json.dumps(record | {"rows": [row._asdict()]}, indent=1))


if __name__ == "__main__":
    main()
