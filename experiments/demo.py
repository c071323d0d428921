"""The demonstration: one recipe, three schedules, one curve, on real images, in minutes.

    make demo

Trains configs/digits.py with "decay", "hybrid" and "increase" and three seeds, by the main job's
own command, one run on each core at a time, and draws the picture and the table of
`experiments.curves` into --output. The same command again continues what is there.
"""

import argparse
from pathlib import Path

from experiments import curves, logs, records, runs, tables
from experiments.command_line import one_line_errors
from experiments.figures import DEMO, REPOSITORY

PRESETS, SEEDS = [curve.config for curve in DEMO.panels[0].curves], 3


def read(folder: Path) -> tables.Results:
    """The runs of a workdir or of a published record."""
    with records.opened(folder) as opened:
        return {
            preset: [logs.read_run(opened / "runs" / f"{preset}-{seed}") for seed in range(SEEDS)]
            for preset in PRESETS
        }


def main() -> None:
    """Trains the demonstration's runs and draws them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--output", type=Path, default=REPOSITORY / "runs" / "demo")
    parser.add_argument("--record", type=Path, help="also keep the runs' logs in this folder")
    options = parser.parse_args()
    output = options.output.resolve()
    wanted = [
        runs.Run(f"configs/digits.py:{preset},seed={seed}", output / "runs" / f"{preset}-{seed}")
        for preset in PRESETS for seed in range(SEEDS)
    ]
    with one_line_errors("experiments.demo"):
        runs.train_missing(
            wanted, output, "experiments.demo", ["--config.tensorboard=false"])
        results = read(output)
        text = curves.draw(DEMO, results, output)
        if options.record:
            records.keep(output, [run.workdir for run in wanted], options.record)
            curves.draw(DEMO, results, options.record)
    print(f"\n{text}\n\n{output / 'curves.png'} has the curves.")


if __name__ == "__main__":
    main()
