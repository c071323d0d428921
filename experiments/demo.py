"""The demonstration: one recipe, three schedules, one curve, on real images, in minutes.

    make demo

Trains configs/digits.py with "decay", "hybrid" and "increase" over several seeds, by the main job's
own command, one run a core at a time, and draws the picture and the table of `experiments.curves`
into --output. Run again, it continues what is there.
"""

import argparse
from pathlib import Path

from bigbatch.mistake import Mistake
from experiments import curves, logs, provenance, records, runs, tables
from experiments.command_line import one_line_errors
from experiments.figures import DEMO, REPOSITORY

PRESETS = [curve.config for curve in DEMO.panels[0].curves]


def read(folder: Path, seeds: int) -> tables.Results:
    """What is drawn, from a workdir or a record."""
    with records.opened(folder) as opened:
        return {
            preset: [logs.read_run(opened / "runs" / f"{preset}-{seed}") for seed in range(seeds)]
            for preset in PRESETS
        }


def main() -> None:
    """Runs the demonstration."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--output", type=Path, default=REPOSITORY / "runs" / "demo")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each schedule")
    parser.add_argument("--record", type=Path, help="also keep the runs' logs in this folder")
    options = parser.parse_args()
    output = options.output.resolve()
    wanted = [
        runs.Run(f"configs/digits.py:{preset},seed={seed}", output / "runs" / f"{preset}-{seed}")
        for preset in PRESETS for seed in range(options.seeds)
    ]
    with one_line_errors("experiments.demo"):
        if options.seeds < 1:
            raise Mistake(f"--seeds is {options.seeds}; it must be 1 or more.")
        missing = runs.missing(wanted)
        provenance.note(output, "experiments.demo", [run.config for run in missing])
        runs.train(missing, ["--config.tensorboard=false"])
        results = read(output, options.seeds)
        text = curves.draw(DEMO, results, output)
        if options.record:
            records.keep(output, [run.workdir for run in wanted], options.record)
            curves.draw(DEMO, results, options.record)
    print(f"\n{text}\n\n{output / 'curves.png'} has the curves.")


if __name__ == "__main__":
    main()
