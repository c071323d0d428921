"""The table of speeds: every benchmark, or some, side by side on this machine.

    python -m experiments.speed.table --output=FILE.json [--only=NAME,...] [--repeats=N] [--short]

Prints a Markdown table and writes FILE.json with the machine, versions and every repeat. What is
compared is measured in turns, in one process, so trust ratios more than seconds. On a GPU
updates are in bfloat16 and of full size, on CPU in float32 and smaller. About 20 minutes on 2
cores. The rows beside PyTorch need `pip install torch` and say so without. `--short` shows in a few
minutes that all of it runs; its measurements say nothing.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

from experiments import provenance
from experiments.speed import new_machine, peers, seeds_together, starts, updates, whole_runs
from experiments.speed.measure import Measurement, markdown

# Each is a function of (repeats, short) that gives measurements.
BENCHMARKS = {
    "goodput": whole_runs.goodput,
    "demo": whole_runs.demo_python,
    "phases": whole_runs.phase_changes,
    "time_to_accuracy": whole_runs.time_to_accuracy,
    "starts": starts.starts,
    "new_machine": new_machine.new_machine,
    "flax_example": peers.flax_example,
    "flax_norm": peers.flax_norm,
    "pytorch": peers.pytorch,
    "accumulation": updates.accumulation,
    "resident_input": updates.resident_input,
    "dispatch": updates.several_a_dispatch,
    "seeds": seeds_together.seeds_together,
}


def main() -> None:
    """Measures the benchmarks that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--only", default=",".join(BENCHMARKS), help="names, with commas between")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--short", action="store_true", help="tiny settings, to see that it runs")
    options = parser.parse_args()
    names = options.only.split(",")
    if unknown := [name for name in names if name not in BENCHMARKS]:
        parser.error(f"--only: {', '.join(unknown)} unknown; allowed are {', '.join(BENCHMARKS)}")
    if options.repeats < 1:
        parser.error(f"--repeats is {options.repeats}; it must be 1 or more")
    if not options.output.parent.is_dir():
        parser.error(f"--output: there is no folder {options.output.parent}")

    record = provenance.describe(provenance.command_line("experiments.speed.table"))
    record |= {"short": options.short, "load_before": round(os.getloadavg()[0], 2)}
    measurements: list[Measurement] = []
    record["measurements"] = rows = []
    for name in names:
        began = time.perf_counter()
        found = BENCHMARKS[name](options.repeats, options.short)
        took = round(time.perf_counter() - began, 1)
        measurements += found
        rows += [{"benchmark": name, "benchmark_seconds": took, **row._asdict()} for row in found]
        options.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(f"{name}: {took} s", file=sys.stderr, flush=True)
    print(markdown(measurements, record["hardware"]))


if __name__ == "__main__":
    main()
