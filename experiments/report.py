"""The report: figures, tables, commands, hardware and versions as report.md and one HTML file."""

import base64
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markdown import markdown

from experiments import figures, tables
from experiments.figures import Figure
from experiments.runs import Run

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
h2 { margin-top: 3rem; border-top: 1px solid #ddd; padding-top: 1.5rem }
img { max-width: 100% } table, pre { display: block; overflow-x: auto; font-size: .85rem }
table { border-collapse: collapse } th, td { border: 1px solid #ddd; padding: .3rem .5rem }
th, pre { background: #f4f4f4 }
"""


def write(
    folder: Path, chosen: Sequence[Figure], scale: str, seeds: int, results: tables.Results,
    made: Mapping[str, Sequence[tables.Table]], trainings: Sequence[dict[str, Any]],
) -> None:
    """Writes report.md and report.html.

    Args:
        folder: to write into; it has the pictures.
        chosen: the figures that are shown.
        scale: one of `figures.SCALES`.
        seeds: runs of each curve.
        results: the runs that the figures are drawn from.
        made: the tables of each figure, by its name.
        trainings: see `provenance`.
    """
    title = "Don't decay the learning rate, increase the batch size"
    text = "\n\n".join(filter(None, [
        f"# {title}",
        "Figures and tables of Smith, Kindermans, Ying and Le (ICLR 2018), reproduced at the scale "
        f"**{scale}**. {figures.SCALES[scale].says}",
        f"Lines are means over {seeds} seed{'s' * (seeds > 1)}, bands go from the lowest to the "
        "highest value, and dotted lines mark where the noise scale falls. A run that diverged is "
        "in no mean: it is a dashed line, with a cross on the axis where it diverged. The paper's "
        "points are means over stretches of its plotted curves, right to about 0.003.",
        " · ".join(f"[{_name(figure)}](#figure-{figure.name})" for figure in chosen),
        *(_section(figure, scale, seeds, results, made[figure.name]) for figure in chosen),
        "## How it was made", *map(_training, trainings),
    ]))
    (folder / "report.md").write_text(text + "\n", encoding="utf-8")

    def inside(found: re.Match) -> str:
        image = base64.b64encode((folder / found[1]).read_bytes()).decode()
        return f'src="data:image/png;base64,{image}"'

    body = re.sub(r'src="(figure_\w+\.png)"', inside, markdown(
        text, extensions=["tables", "fenced_code", "md_in_html"]))
    (folder / "report.html").write_text(f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}: {scale} scale</title>
<style>{STYLE}</style></head><body>
{body}
</body></html>
""", encoding="utf-8")


def _name(figure: Figure) -> str:
    return f"Figure {figure.name}" if figure.name.isdigit() else figure.title.split(":")[0]


def _section(
    figure: Figure, scale: str, seeds: int, results: tables.Results, made: Sequence[tables.Table]
) -> str:
    number = f"Figure {figure.name}. " * figure.name.isdigit()
    other = not figures.SCALES[scale].comparable and figure.panels[0].family != figures.CIFAR10
    parts = [
        f'<a id="figure-{figure.name}"></a>', f"## {number}{figure.title}",
        f"The paper: {figure.claim[0].lower()}{figure.claim[1:]}",
        "Only its schedules are reproduced here: network and data are this scale's." * other,
        f"![{figure.title}](figure_{figure.name}.png)",
        *(f"### {table.name}\n\n{tables.markdown(table)}" for table in made),
        _runs(figure, scale, seeds, results) if figure.trained else "",
    ]
    return "\n\n".join(filter(None, parts))


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
    return "\n\n".join([
        '<details markdown="1"><summary>Commands and phases</summary>',
        f"One run each, for SEED from 0 to {seeds - 1}:", _code("\n".join(commands)),
        tables.markdown(phases), "</details>",
    ])


def _training(training: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in training["versions"].items())
    return (f"{_code(training['command'])}\n\n{training['began']}, on {training['hardware']}. "
            f"{versions}. Revision {training['revision']}. {len(training['configs'])} runs were "
            "trained; those that had finished before were left as they were.")


def _code(text: str) -> str:
    return f"```\n{text}\n```"
