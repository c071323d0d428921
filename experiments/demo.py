"""The demonstration: one recipe, three schedules, one curve, on real images, in minutes.

    make demo

Trains configs/digits.py with "decay", "hybrid" and "increase" over several seeds, by the main job's
own command, one run a core at a time, and draws the picture and the table of `experiments.curves`
into --output. Run again, it continues what is there.
"""

import argparse
from pathlib import Path

from experiments import curves, records
from experiments.command_line import one_line_errors
from experiments.figures import REPOSITORY
from experiments.runs import Run, train_noted

PRESETS = ("decay", "hybrid", "increase")  # the longest first, so that no core idles at the end


def draw(folder: Path, seeds: int, output: Path) -> str:
    """Draws the picture and writes the table, which it returns, from a workdir or a record."""
    with records.opened(folder) as opened:
        schedules = {
            preset: [curves.read_run(opened / "runs" / f"{preset}-{seed}") for seed in range(seeds)]
            for preset in PRESETS
        }
    curves.draw(schedules, output / "curves.png", "digits: one recipe, three schedules")
    text = curves.table(schedules)
    (output / "table.md").write_text(text, encoding="utf-8")
    return text


def main() -> None:
    """Runs the demonstration."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--output", type=Path, default=REPOSITORY / "runs" / "demo")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each schedule")
    parser.add_argument("--record", type=Path, help="also keep the runs' logs in this folder")
    options = parser.parse_args()
    output = options.output.resolve()
    runs = [
        Run(f"configs/digits.py:{preset},seed={seed}", output / "runs" / f"{preset}-{seed}")
        for preset in PRESETS for seed in range(options.seeds)
    ]
    with one_line_errors("experiments.demo"):
        if options.seeds < 1:
            raise ValueError(f"--seeds is {options.seeds}; it must be 1 or more.")
        train_noted(output, "experiments.demo", runs, ["--config.tensorboard=false"])
        text = draw(output, options.seeds, output)
        if options.record:
            records.keep(output, [run.workdir for run in runs], options.record)
            draw(options.record, options.seeds, options.record)
    print(f"\n{text}\n{output / 'curves.png'} has the curves.")


if __name__ == "__main__":
    main()
