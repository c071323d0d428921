"""report.html: figures, tables, commands, hardware and versions in one file, without a network."""

import base64
import shlex
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from experiments import figures, tables
from experiments.figures import Figure
from experiments.runs import Run

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem;
       color: #222; background: #fff }
h1, h2 { line-height: 1.2 } h2 { margin-top: 3rem; border-top: 1px solid #ddd; padding-top: 1.5rem }
img { max-width: 100%; height: auto } .wide { overflow-x: auto }
table { border-collapse: collapse; font-size: .85rem; margin: .5rem 0 }
th, td { border: 1px solid #ddd; padding: .3rem .5rem; text-align: left; vertical-align: top }
th { background: #f4f4f4 } pre { background: #f4f4f4; padding: .75rem; overflow-x: auto;
     font-size: .8rem } .note { color: #555; font-size: .85rem } nav a { margin-right: .75rem }
"""


def write(
    path: Path, chosen: Sequence[Figure], scale: str, seeds: int, results: tables.Results,
    pictures: dict[str, Path], trainings: Sequence[dict[str, Any]],
) -> None:
    """Writes the report.

    Args:
        path: of the file.
        chosen: the figures in it.
        scale: one of `figures.SCALES`.
        seeds: runs of each curve.
        results: what they are drawn from.
        pictures: an SVG file by figure.
        trainings: see `provenance`.
    """
    sections = [
        _section(figure, scale, seeds, results, pictures[figure.name]) for figure in chosen
    ]
    links = "".join(f'<a href="#figure-{figure.name}">{_name(figure)}</a>' for figure in chosen)
    path.write_text(f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Don't decay the learning rate, increase the batch size: {escape(scale)} scale</title>
<style>{STYLE}</style></head><body>
<h1>Don't decay the learning rate, increase the batch size</h1>
<p>Figures and tables of Smith, Kindermans, Ying and Le (ICLR 2018), reproduced at the scale
<b>{escape(scale)}</b>. {escape(figures.SCALES[scale].says)}</p>
<p>Lines are means over {seeds} seed{"s" * (seeds > 1)}, bands go from the lowest to the highest,
dotted lines stand where the noise scale falls. A run that diverged is in no mean: it is a dashed
line, with a cross at the axis where it broke down. The paper's points are means over stretches of
its plotted curves, right to about 0.003.</p>
<nav>{links}<a href="#made">How it was made</a></nav>
{"".join(sections)}
<h2 id="made">How it was made</h2>
{"".join(_training(training) for training in trainings)}
</body></html>
""", encoding="utf-8")


def _name(figure: Figure) -> str:
    return f"Figure {figure.name}" if figure.name.isdigit() else escape(figure.title.split(":")[0])


def _section(
    figure: Figure, scale: str, seeds: int, results: tables.Results, picture: Path
) -> str:
    image = base64.b64encode(picture.read_bytes()).decode()
    made = "".join(_table(table) for table in tables.make(figure, scale, results))
    title = escape(figure.title)
    heading = f"Figure {figure.name}. {title}" if figure.name.isdigit() else title
    runs = "" if figure.kind == "schedules" else _runs(figure, scale, seeds, results)
    other = not figures.SCALES[scale].comparable and figure.panels[0].family != "cifar10"
    note = "<p>Here its schedules alone: network and data are this scale's.</p>" * other
    return f"""<h2 id="figure-{figure.name}">{heading}</h2>
<p>The paper: {escape(figure.claim[0].lower() + figure.claim[1:])}</p>{note}
<img alt="{title}" src="data:image/svg+xml;base64,{image}">
{made}{runs}"""


def _table(table: tables.Table) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in table.header)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
        for row in table.cells
    )
    return (f"<h3>{escape(table.name)}</h3><div class=wide><table><tr>{head}</tr>{body}</table>"
            f"</div><p class=note>{escape(table.note)}</p>")


def _runs(figure: Figure, scale: str, seeds: int, results: tables.Results) -> str:
    """The commands of the runs, and each curve's phases."""
    commands, rows = {}, {}
    for panel in figure.panels:
        for curve in panel.curves:
            text = figures.config_text(scale, panel, curve, 0).rpartition("seed=")[0] + "seed=SEED"
            first = results[curve.config][0]
            data_dir = first.config["data"]["dir"]
            settings = [f"--config.data.dir={data_dir}"] * bool(data_dir)
            commands[shlex.join(Run(text, Path("DIR")).command(settings))] = None
            for phase in first.phases:
                rows[curve.config, phase["index"]] = [
                    f"{curve.label} ({curve.config})", phase["name"], str(phase["batch_size"]),
                    f"{phase['learning_rate']:.5g}", f"{phase['momentum']:g}",
                    f"{phase['updates']:,}", f"{phase['noise_scale']:.4g}",
                    f"{phase['lost_epochs']:.3g}",
                ]
    phases = tables.Table("Phases", [
        "curve", "phase", "batch", "learning rate", "momentum", "updates", "noise scale",
        "epochs to fill the accumulator",
    ], list(rows.values()), "")
    seeds_text = f"for SEED from 0 to {seeds - 1}"
    return (f"<details><summary>Commands and phases</summary><p>One run each, {seeds_text}:</p>"
            f"<pre>{escape(chr(10).join(commands))}</pre>{_table(phases)}</details>")


def _training(training: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in training["versions"].items())
    return f"""<pre>{escape(training["command"])}</pre>
<p>{escape(training["began"])}, on {escape(training["hardware"])}. {escape(versions)}. Revision
{escape(training["revision"])}. For {len(training["configs"])} runs; what was finished before
was left as it was.</p>"""
