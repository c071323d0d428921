"""Every figure and table of the paper from one command.

    python -m experiments.reproduce --figure=3b --scale=small --seeds=3 --workdir=DIR

Trains what is missing (skips what is finished, continues what was cut short), then draws a picture
a figure, tables.md and report.html. Figures are 1 to 7, A, B and 30min, or one panel of them, or
all. Scales: `paper`, the full recipes; `small`, for a laptop with CIFAR-10; `digits`, the quickest,
without a download. That a run diverges is a result: it is drawn as far as it came, is in no mean,
and is not trained again.

    python -m experiments.reproduce --figure=all --scale=small --draw_only --workdir=RECORD \
        --output=DIR

trains nothing, and draws from a workdir or a record.
"""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

from experiments import curves, drawing, figures, provenance, records, report, runs, tables
from experiments.command_line import one_line_errors


def wanted(
    chosen: Sequence[figures.Figure], scale: str, seeds: int, workdir: Path
) -> list[runs.Run]:
    """The runs that figures are drawn from, each once: all of seed 0, then of seed 1, ..."""
    texts = dict.fromkeys(
        figures.config_text(scale, panel, curve, seed)
        for seed in range(seeds) for panel, curve in _trained(chosen)
    )
    return [runs.Run(text, folder_of(workdir, text)) for text in texts]


def folder_of(workdir: Path, text: str) -> Path:
    """Where the run of a config text lies; figures that share a curve share its runs."""
    return workdir / "runs" / text.partition(":")[2].replace(",", "_")


def read(
    chosen: Sequence[figures.Figure], scale: str, seeds: int, folder: Path, source: Path
) -> dict[str, list[curves.Logs]]:
    """What figures are drawn from, by the curve's config.

    Args:
        chosen: the figures.
        scale: one of `figures.SCALES`.
        seeds: runs of each curve.
        folder: with the runs in it.
        source: what to call that in messages: a workdir, or the record that was unpacked there.

    Raises:
        ValueError: naming the first run that is missing, not over, or of another config.
    """
    results = {}
    for panel, curve in _trained(chosen):
        if curve.config not in results:
            texts = [figures.config_text(scale, panel, curve, seed) for seed in range(seeds)]
            results[curve.config] = []
            for text in texts:
                run = runs.Run(text, folder_of(folder, text))
                try:
                    found = curves.read_run(run.workdir)
                    runs.is_over(run)  # raises where it is another config's
                except ValueError as error:
                    raise ValueError(f"{source} cannot be drawn from: {error}") from None
                results[curve.config].append(found)
    return results


def draw(
    chosen: Sequence[figures.Figure], scale: str, seeds: int, source: Path, output: Path
) -> None:
    """Draws figures from a workdir or a record into `output`.

    Raises:
        ValueError: see `read`; nothing has been drawn then.
    """
    output.mkdir(parents=True, exist_ok=True)
    results = {}
    if _trained(chosen):
        with records.opened(source) as folder:
            results = read(chosen, scale, seeds, folder, source)
    pictures, text = {}, [f"# The paper's figures at the scale {scale}\n",
                          f"{figures.SCALES[scale].says} Seeds a curve: {seeds}.\n"]
    overview = tables.summary(chosen, scale, results)
    if overview.cells:
        text += [f"## {overview.name}\n", tables.markdown(overview)]
    for figure in chosen:
        for kind in ("png", "svg"):
            pictures[figure.name] = output / f"figure_{figure.name}.{kind}"
            drawing.draw(figure, scale, results, pictures[figure.name])
        for table in tables.make(figure, scale, results):
            text += [f"## {table.name}: {figure.title}\n", tables.markdown(table)]
    (output / "tables.md").write_text("\n".join(text), encoding="utf-8")
    report.write(output / "report.html", chosen, scale, seeds, results, pictures,
                 provenance.read(source))


def _absolute(folder: str) -> str:
    """A data_dir as runs find it, which start in the repository."""
    return folder if "://" in folder else str(Path(folder).expanduser().resolve())


def _trained(chosen: Sequence[figures.Figure]) -> list[tuple[figures.Panel, figures.Curve]]:
    """The curves of figures that show runs, with a panel each is in."""
    return [
        (panel, curve) for figure in chosen if figure.kind != "schedules"
        for panel in figure.panels for curve in panel.curves
    ]


def main() -> None:
    """Trains and draws what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figure", required=True, help="all, or some: 2, 3b, A, 30min, 2,5")
    parser.add_argument("--scale", required=True, choices=figures.SCALES)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each curve")
    parser.add_argument("--workdir", required=True, type=Path)
    parser.add_argument("--output", type=Path, help="folder for what is drawn; else --workdir")
    parser.add_argument("--data_dir", default="", help="TFDS data_dir; empty: TFDS's own default")
    parser.add_argument("--at_once", type=int, default=0,
                        help="runs side by side; 0: one a core on CPU, one on an accelerator")
    parser.add_argument("--draw_only", action="store_true", help="train nothing")
    parser.add_argument("--record", type=Path,
                        help="also keep the runs' logs in this folder, with tables and pictures")
    options = parser.parse_args()
    workdir = options.workdir.expanduser().resolve()
    output = options.output or workdir
    with one_line_errors("experiments.reproduce"):
        if options.record and options.record.resolve() in (workdir, output.resolve()):
            raise ValueError(f"--record is {options.record}; it must be a folder of its own, "
                             "neither --workdir nor --output.")
        for folder in filter(None, (output, options.record)):
            try:  # before hours of training
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ValueError(f"{folder} can be no folder: {error.strerror}.") from None
        if options.seeds < 1:
            raise ValueError(f"--seeds is {options.seeds}; it must be 1 or more.")
        if options.at_once < 0:
            raise ValueError(f"--at_once is {options.at_once}; it must be 0 or more.")
        chosen = figures.select(options.figure)
        needed = wanted(chosen, options.scale, options.seeds, workdir)
        if not options.draw_only:
            settings = [f"--config.data.dir={_absolute(options.data_dir)}"]
            runs.train_noted(workdir, "experiments.reproduce", needed,
                             settings * bool(options.data_dir), options.at_once)
        draw(chosen, options.scale, options.seeds, workdir, output)
        if options.record:
            records.keep(workdir, [run.workdir for run in needed], options.record)
            for drawn in ["tables.md", *(f"figure_{figure.name}.png" for figure in chosen)]:
                shutil.copy(output / drawn, options.record)
    print(f"{output}: report.html has it all, tables.md the numbers")


if __name__ == "__main__":
    main()
