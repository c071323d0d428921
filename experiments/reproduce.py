"""Every figure and table of the paper from one command.

    python -m experiments.reproduce --figure=3b --scale=small --seeds=3 --workdir=DIR

Trains what is missing (skips what is finished, continues what was cut short), then draws: into
--workdir a picture a figure, tables.md and report.html. `--figure=all`, or some: 1, 2, 3, 3b, 4, 5,
6, 7, A, B, 30min, as 2,3a,5. Scales: `paper`, the full recipes; `small`, for a laptop with CIFAR-10;
`digits`, the quickest, without a download. `--draw_only` trains nothing.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments import figures, provenance, runs


def wanted(
    chosen: Sequence[figures.Figure], scale: str, seeds: int, workdir: Path
) -> list[runs.Run]:
    """The runs that figures are drawn from, each once: all of seed 0, then of seed 1, ..."""
    texts = dict.fromkeys(
        figures.config_text(scale, panel, curve, seed)
        for seed in range(seeds)
        for figure in chosen if figure.kind != "schedules"
        for panel in figure.panels
        for curve in panel.curves
    )
    return [runs.Run(text, folder_of(workdir, text)) for text in texts]


def folder_of(workdir: Path, text: str) -> Path:
    """Where the run of a config text lies; figures that share a curve share its runs."""
    return workdir / "runs" / text.partition(":")[2].replace(",", "_")


def main() -> None:
    """Trains and draws what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figure", required=True, help="all, or names: 2, 3b, A, 30min, 2,5")
    parser.add_argument("--scale", required=True, choices=figures.SCALES)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each curve")
    parser.add_argument("--workdir", required=True, type=Path)
    parser.add_argument("--data_dir", default="", help="TFDS data_dir; empty: TFDS's own default")
    parser.add_argument("--at_once", type=int, default=0,
                        help="runs side by side; 0: one a core on CPU, one on an accelerator")
    parser.add_argument("--draw_only", action="store_true", help="train nothing")
    options = parser.parse_args()
    try:
        if options.seeds < 1:
            raise ValueError(f"--seeds is {options.seeds}; it must be 1 or more.")
        if options.at_once < 0:
            raise ValueError(f"--at_once is {options.at_once}; it must be 0 or more.")
        chosen = figures.select(options.figure)
        needed = wanted(chosen, options.scale, options.seeds, options.workdir.resolve())
        if not options.draw_only and not all(runs.is_finished(run) for run in needed):
            provenance.add(options.workdir, provenance.describe(
                provenance.command_line("experiments.reproduce"), [run.config for run in needed]))
            settings = [f"--config.data.dir={options.data_dir}"] if options.data_dir else []
            runs.train_all(needed, settings, options.at_once)
    except (ValueError, RuntimeError) as error:
        sys.exit(f"experiments.reproduce: {error}")
    except KeyboardInterrupt:
        sys.exit("experiments.reproduce: stopped; the same command goes on from here.")


if __name__ == "__main__":
    main()
