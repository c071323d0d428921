"""Learning curves of several schedules, mean and spread over seeds, from their workdirs.

    python -m experiments.curves --output=FOLDER decay=DIR,DIR increase=DIR,DIR

Writes curves.png (training loss, and test accuracy or else test loss, against epochs and against
updates, as in the paper's Figures 2 and 3) and table.md, and prints the table. `drawing` says what
the lines mean.
"""

import argparse
import statistics
from pathlib import Path

from bigbatch.mistake import Mistake
from experiments import drawing, figures, tables
from experiments.command_line import one_line_errors
from experiments.logs import check_seeds, judged_by, read_run, updates_of
from experiments.markdown_table import markdown_table


def draw(figure: figures.Figure, results: tables.Results, output: Path) -> str:
    """Writes curves.png and table.md into `output`; returns the table's text."""
    output.mkdir(parents=True, exist_ok=True)
    drawing.draw(figure, None, results).savefig(output / "curves.png", dpi=110)
    text = table(results)
    (output / "table.md").write_text(text + "\n", encoding="utf-8")
    return text


def table(results: tables.Results) -> str:
    """A Markdown table with each schedule's final accuracy (or loss), updates and seconds."""
    quantity = judged_by(run for runs in results.values() for run in runs)
    rows = []
    for name, runs in results.items():
        seconds = [run.seconds for run in runs if run.seconds]
        rows.append([
            name, str(len(runs)), tables.final_text(runs, quantity),
            updates_of(runs),
            f"{statistics.mean(seconds):.1f}" if seconds else "not recorded",
        ])
    return markdown_table(
        ["schedule", "seeds", f"final {tables.label_of(quantity)}", "updates", "seconds a run"],
        rows)


def main() -> None:
    """Draws the runs that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--output", required=True, type=Path, help="folder for the results")
    parser.add_argument("--title", default="")
    parser.add_argument("schedules", nargs="+", metavar="NAME=DIR,DIR", help="runs by schedule")
    options = parser.parse_args()
    with one_line_errors("experiments.curves"):
        results = {}
        for text in options.schedules:
            name, equals, folders = text.partition("=")
            if not (name and equals and folders):
                raise Mistake(f"{text!r} is no NAME=DIR,DIR.")
            results[name] = [read_run(folder) for folder in folders.split(",")]
            check_seeds(name, results[name])
        quantity = judged_by(run for runs in results.values() for run in runs)
        figure = figures.of_schedules(list(results), options.title, quantity)
        print(draw(figure, results, options.output))


if __name__ == "__main__":
    main()
