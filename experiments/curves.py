"""Learning curves of several schedules, mean and spread over seeds, from their workdirs.

    python -m experiments.curves --output=FOLDER decay=DIR,DIR increase=DIR,DIR

Writes curves.png (train loss and test accuracy against epochs, and the same against updates, as
the paper's Figures 2 and 3) and table.md, and prints the table. Losses are means over an epoch's
logged updates; dotted lines stand where the noise falls.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from bigbatch import bucket
from bigbatch.metrics import read_events

COLOURS = ("#3b6fb6", "#d9822b", "#3a9a5b", "#8a4fa3", "#b6403b", "#6b6b6b", "#c2a415")


class Logs(NamedTuple):
    """What one workdir says of its run."""

    events: list[dict[str, Any]]
    seconds: float | None  # of wall-clock time, all starts together, without what a kill lost
    phases: list[dict[str, Any]]


def read_run(workdir: str | Path) -> Logs:
    """The logs of a finished run, in a folder or in a bucket (gs://).

    Raises:
        ValueError: if the workdir holds none, or a run that has not come to its end.
    """
    with bucket.opened(workdir) as (folder, mirror):
        if mirror:
            mirror.bring_down_logs()
        events = read_events(folder / "metrics.jsonl")
        if not events:
            raise ValueError(
                f"{workdir} has no metrics.jsonl with events in it: no run was made here.")
        phases = json.loads((folder / "config.json").read_text(encoding="utf-8"))["phases"]
        timing = read_events(folder / "timing.jsonl")
    if events[-1]["examples_seen"] != phases[-1]["end_example"]:
        raise ValueError(
            f"{workdir} holds a run that stands at example {events[-1]['examples_seen']} of "
            f"{phases[-1]['end_example']}: give its command again until it has finished."
        )
    seconds = [event["seconds"] for event in timing if "seconds" in event]
    return Logs(events, sum(seconds) or None, phases)


def epoch_means(events: Sequence[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Whole epochs, and the mean of `name` over the events in each: one batch's loss is noisy."""
    values = np.array([event[name] for event in events])
    # The epoch in which the event's update began: the update that ends an epoch may end past it.
    begun = [
        event["epoch"] * (1 - event["batch_size"] / event["examples_seen"]) for event in events
    ]
    of = np.floor(np.round(begun, 9)).astype(int) + 1
    whole = np.unique(of)
    return whole.astype(float), np.array([values[of == epoch].mean() for epoch in whole])


def at_updates(run: Logs, epochs: np.ndarray) -> np.ndarray:
    """How many updates `run` had made by each of `epochs`."""
    ends = np.array([0.0] + [event["epoch"] for event in run.events])
    updates = np.array([0.0] + [event["updates"] for event in run.events])
    return np.interp(epochs, ends, updates)


def spread(rows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, lowest and highest over runs that were measured at the same epochs."""
    table = np.stack(rows)
    return table.mean(axis=0), table.min(axis=0), table.max(axis=0)


def draw(schedules: Mapping[str, Sequence[Logs]], path: Path, title: str = "") -> None:
    """The picture: rows are train loss and test accuracy, columns epochs and updates."""
    if len(schedules) > len(COLOURS):
        raise ValueError(f"{len(schedules)} schedules are more than the {len(COLOURS)} colours.")
    figure = Figure(figsize=(11, 7.2), layout="constrained")
    axes = figure.subplots(2, 2, sharey="row")
    for colour, (name, runs) in zip(COLOURS, schedules.items(), strict=False):
        losses = [epoch_means(run.events, "train_loss") for run in runs]
        tested = [[event for event in run.events if "test_accuracy" in event] for run in runs]
        accuracies = [epoch_means(events, "test_accuracy") for events in tested]
        for row, curves in enumerate((losses, accuracies)):
            epochs = curves[0][0]
            if any(len(other) != len(epochs) or (other != epochs).any() for other, _ in curves):
                raise ValueError(f"the runs of {name} were logged at different epochs.")
            mean, low, high = spread([values for _, values in curves])
            for column, across in enumerate((epochs, at_updates(runs[0], epochs))):
                axis = axes[row][column]
                axis.fill_between(across, low, high, color=colour, alpha=0.18, linewidth=0)
                axis.plot(across, mean, color=colour, linewidth=1.6,
                          label=f"{name} ({runs[0].events[-1]['updates']:,} updates)")
    longest = max(schedules.values(), key=lambda runs: len(runs[0].phases))[0]
    for phase in longest.phases[1:]:
        for axis in axes[:, 0]:  # where the noise falls
            axis.axvline(phase["start_example"] / _examples(longest), color="black", alpha=0.3,
                         linewidth=0.8, linestyle=":")
    axes[0][0].set_yscale("log")
    axes[0][0].set_ylabel("train loss")
    axes[1][0].set_ylabel("test accuracy")
    lowest = min(
        np.median(epoch_means([e for e in run.events if "test_accuracy" in e], "test_accuracy")[1])
        for runs in schedules.values() for run in runs
    )
    axes[1][0].set_ylim(lowest - 2 * (1 - lowest), min(1.0, lowest + 1.1 * (1 - lowest)))
    for axis, label in zip(axes[1], ("epochs", "parameter updates"), strict=True):
        axis.set_xlabel(label)
        axis.set_xlim(left=0)
    axes[0][0].legend(frameon=False)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    if title:
        figure.suptitle(title)
    figure.savefig(path, dpi=110)


def table(schedules: Mapping[str, Sequence[Logs]]) -> str:
    """Markdown: final accuracy, updates and seconds of each schedule."""
    lines = [
        "| schedule | seeds | final test accuracy | updates | seconds a run |",
        "|---|---|---|---|---|",
    ]
    for name, runs in schedules.items():
        finals = [100 * run.events[-1]["test_accuracy"] for run in runs]
        deviation = f" ± {statistics.stdev(finals):.2f}" if len(finals) > 1 else ""
        seconds = [run.seconds for run in runs if run.seconds]
        took = f"{statistics.mean(seconds):.1f}" if seconds else "not recorded"
        updates = runs[0].events[-1]["updates"]
        lines.append(
            f"| {name} | {len(runs)} | {statistics.mean(finals):.2f}{deviation} % | {updates:,} | "
            f"{took} |"
        )
    return "\n".join(lines) + "\n"


def _examples(run: Logs) -> float:
    """N, from any event."""
    return run.events[-1]["examples_seen"] / run.events[-1]["epoch"]


def main() -> None:
    """Draws what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--output", required=True, type=Path, help="folder for the results")
    parser.add_argument("--title", default="")
    parser.add_argument("schedules", nargs="+", metavar="NAME=DIR,DIR", help="runs by schedule")
    options = parser.parse_args()
    try:
        schedules = {}
        for text in options.schedules:
            name, equals, folders = text.partition("=")
            if not (name and equals and folders):
                raise ValueError(f"{text!r} is no NAME=DIR,DIR.")
            schedules[name] = [read_run(folder) for folder in folders.split(",")]
    except ValueError as error:
        sys.exit(f"experiments.curves: {error}")
    options.output.mkdir(parents=True, exist_ok=True)
    draw(schedules, options.output / "curves.png", options.title)
    (options.output / "table.md").write_text(table(schedules), encoding="utf-8")
    print(table(schedules), end="")


if __name__ == "__main__":
    main()
