"""Every figure and table of the paper from one command.

    python -m experiments.reproduce --figure=3b --scale=small --seeds=3 --workdir=DIR

Trains the runs that are missing (finished runs are left alone, stopped ones continued), then draws
a picture of each figure and writes tables.md, report.md and report.html. Figures are 1 to 7, A, B
and 30min, or one panel of them, or all; and beyond the paper `cosine`, `exchange`, `language`,
`noise` and `noise_language`. Scales:
`paper`, the full recipes; `medium`, all of CIFAR-10 with a small network, an hour for each run on
one core (only Figures 1, 2, 3a and 5); `small`, for a laptop with CIFAR-10; `digits`, the quickest,
without a download. A run that diverges is a result: it is drawn up to where it diverged, is in no
mean, and is not trained again.

    python -m experiments.reproduce --figure=3 --scale=small --workdir=RECORD --draw_only --output=O

trains nothing, and draws from a workdir or a published record. With --curve=decay --curve=increase
it draws these curves alone (or trains them alone), and with --against_updates each panel a second
time, against updates.

    python -m experiments.reproduce --figure=all --scale=paper --workdir=DIR --print_commands

trains nothing either, and prints the command of each run that is not over, each on a line, for a
cluster's queue, or for `xargs -d '\\n' -P 4 -I COMMAND sh -c COMMAND`, in the repository. Then
--draw_only draws. (A record needs runs that this program trained, because it names their machine.)

Keys that change nothing that is learned can be set for all runs, to suit the hardware, as with
`--config.max_per_device_batch=640 --config.eval_batch_size=2500`.
"""

import argparse
import functools
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from bigbatch.mistake import Mistake
from experiments import (
    drawing,
    figures,
    logs,
    provenance,
    records,
    report,
    runs,
    selection,
    tables,
)
from experiments.command_line import data_settings, hardware_settings, one_line_errors


def wanted(
    chosen: Sequence[figures.Figure], scale: str, seeds: int, workdir: Path
) -> dict[runs.Run, str]:
    """The runs that figures are drawn from, each with its Curve.config; all of seed 0 come first.

    Figures that share a curve share its runs.
    """
    found = {}
    for seed in range(seeds):
        for panel in (panel for figure in chosen if figure.trained for panel in figure.panels):
            for curve in panel.curves:
                text = figures.config_text(scale, panel, curve, seed)
                found[runs.Run(text, folder_of(workdir, text))] = curve.config
    return found


def folder_of(workdir: Path, text: str) -> Path:
    """The workdir of the run of a config text."""
    return workdir / "runs" / text.partition(":")[2].replace(",", "_")


def read(
    chosen: Sequence[figures.Figure], scale: str, seeds: int, folder: Path, source: Path
) -> dict[str, list[logs.Logs]]:
    """The runs that figures are drawn from, by the curve's config.

    Args:
        chosen: the figures.
        scale: one of `figures.SCALES`.
        seeds: runs of each curve.
        folder: with the runs in it.
        source: the name of `folder` in messages: a workdir, or the record that was unpacked there.

    Raises:
        Mistake: naming the first run that is missing, not over, or of another config.
    """
    results: dict[str, list[logs.Logs]] = {}
    needed = wanted(chosen, scale, seeds, folder)
    there = [run.workdir.is_dir() for run in needed]
    try:
        if not all(there):
            missing = there.index(False)  # all of seed 0 come first
            whole = missing // (len(needed) // seeds)
            raise Mistake(
                f"it has no {list(needed)[missing].workdir.relative_to(folder)}. "
                + (f"Of these curves it has {whole} of {seeds} seeds: give --seeds={whole}."
                   if whole else "--curve=NAME draws a figure without the others of its curves."))
        for run, config in needed.items():
            found = logs.read_run(run.workdir)
            runs.refuse_another(run, {
                "config": found.config, "phases": found.phases,
                "examples_seen": found.events[-1]["examples_seen"] if found.events else 0,
            } | ({"version": found.version} if found.version else {}))
            results.setdefault(config, []).append(found)
    except Mistake as error:
        said = str(error).replace(str(folder), str(source))  # a record was unpacked for a moment
        raise Mistake(f"{source} cannot be drawn from: {said}") from None
    return results


def draw(
    chosen: Sequence[figures.Figure], scale: str, seeds: int, source: Path, output: Path
) -> None:
    """Draws figures from a workdir or a record into `output`.

    Raises:
        Mistake: see `read`; nothing has been drawn then.
    """
    output.mkdir(parents=True, exist_ok=True)
    results = {}
    if any(figure.trained for figure in chosen):
        with records.opened(source) as folder:
            results = read(chosen, scale, seeds, folder, source)
    whose = "The paper's figures" if all(figure.papers for figure in chosen) else "Figures"
    text = [f"# {whose} at the scale {scale}\n",
            f"{figures.SCALES[scale].says} Seeds a curve: {seeds}.\n"]
    overview = tables.summary(chosen, scale, results)
    if overview.cells:
        text += [f"## {overview.name}\n", tables.markdown(overview)]
    made = {}
    for figure in chosen:
        drawing.draw(figure, scale, results).savefig(output / f"figure_{figure.name}.png", dpi=110)
        made[figure.name] = tables.make(figure, scale, results)
        for table in made[figure.name]:
            text += [f"## {table.name}: {figure.title}\n", tables.markdown(table)]
    (output / "tables.md").write_text("\n".join(text), encoding="utf-8")
    report.write(output, chosen, scale, seeds, results, made, provenance.read(source))


def main() -> None:
    """Trains and draws the figures that the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figure", required=True, help="all, or some: 2, 3b, A, 30min, 2,5")
    parser.add_argument("--curve", action="append", default=[], metavar="NAME",
                        help="only this curve, as figures.py calls its config; may be given again")
    parser.add_argument("--against_updates", action="store_true",
                        help="draw what is against epochs against updates too")
    parser.add_argument("--scale", required=True, choices=figures.SCALES)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each curve")
    parser.add_argument("--workdir", required=True, type=Path)
    parser.add_argument("--output", type=Path, help="folder for what is drawn; else --workdir")
    parser.add_argument("--data_dir", default="", help="TFDS data_dir; empty: TFDS's own default")
    parser.add_argument("--at_once", type=int, default=0,
                        help="runs side by side; 0: one on each core, or one on an accelerator")
    parser.add_argument("--draw_only", action="store_true", help="train nothing")
    parser.add_argument("--print_commands", action="store_true",
                        help="train and draw nothing; print the commands of the missing runs")
    parser.add_argument("--record", type=Path,
                        help="also keep the runs' logs in this folder, with tables and pictures")
    options, flags = parser.parse_known_args()
    workdir = options.workdir.expanduser().resolve()
    output = options.output or workdir
    with one_line_errors("experiments.reproduce"):
        if options.record and options.record.resolve() in (workdir, output.resolve()):
            raise Mistake(f"--record is {options.record}; it must be a folder of its own, "
                             "neither --workdir nor --output.")
        if options.seeds < 1:
            raise Mistake(f"--seeds is {options.seeds}; it must be 1 or more.")
        if options.at_once < 0:
            raise Mistake(f"--at_once is {options.at_once}; it must be 0 or more.")
        if records.is_record(workdir) and not (options.draw_only and options.output):
            raise Mistake(f"--workdir is {options.workdir}, a record; give --draw_only and "
                          "--output=FOLDER, so that it stays as it was published.")
        if records.is_record(output):
            raise Mistake(f"--output is {output}, a record, which stays as it was published; give "
                          "another folder.")
        chosen = selection.select(options.figure, options.scale)
        if options.curve:
            chosen = selection.only(chosen, options.curve)
        if options.against_updates:
            chosen = [selection.beside_updates(figure) for figure in chosen]
        needed = wanted(chosen, options.scale, options.seeds, workdir)
        settings = data_settings(options.data_dir) + hardware_settings(flags)
        if options.print_commands:
            for run in runs.missing(list(needed), functools.partial(print, file=sys.stderr)):
                print(shlex.join(run.command(settings, sys.executable)))
            return
        for folder in filter(None, (output, options.record)):
            try:  # before hours of training
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise Mistake(f"{folder} can be no folder: {error.strerror}.") from None
        if not options.draw_only:
            runs.train_missing(
                list(needed), workdir, "experiments.reproduce", settings, options.at_once)
        draw(chosen, options.scale, options.seeds, workdir, output)
        if options.record:
            records.keep(workdir, [run.workdir for run in needed], options.record)
            for drawn in ["tables.md", *(f"figure_{figure.name}.png" for figure in chosen)]:
                shutil.copy(output / drawn, options.record)
    print(f"{output}: report.html has all figures and tables, tables.md the numbers")


if __name__ == "__main__":
    main()
