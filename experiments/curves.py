"""Learning curves of several schedules, mean and spread over seeds, from their workdirs.

    python -m experiments.curves --output=FOLDER decay=DIR,DIR increase=DIR,DIR

Writes curves.png (train loss and test accuracy against epochs, and the same against updates, as
the paper's Figures 2 and 3) and table.md, and prints the table. Losses are means over an epoch's
logged updates; dotted lines stand where the noise falls. A run that diverged is in no mean: it is a
dashed line, with a cross at the axis where it broke down.
"""

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from bigbatch.storage import bucket
from bigbatch.storage.logs import read_events
from experiments.command_line import one_line_errors

COLOURS = ("#3b6fb6", "#d9822b", "#3a9a5b", "#8a4fa3", "#b6403b", "#6b6b6b", "#c2a415")


class Logs(NamedTuple):
    """What one workdir says of its run, which came to its end or diverged."""

    events: list[dict[str, Any]]  # of metrics.jsonl; a run that diverged at once has none
    timing: list[dict[str, Any]]  # of timing.jsonl
    config: dict[str, Any]
    phases: list[dict[str, Any]]

    @property
    def diverged(self) -> dict[str, Any] | None:
        """See `divergence`."""
        return divergence(self.timing)

    @property
    def examples(self) -> int:
        """N."""
        return self.config["data"]["train_examples"]

    @property
    def updates(self) -> int:
        """Of the schedule: as many as a run makes that does not diverge."""
        return sum(phase["updates"] for phase in self.phases)

    @property
    def seconds(self) -> float | None:
        """Of wall-clock time, all starts together, without what a kill lost."""
        return sum(event["seconds"] for event in self.timing if "seconds" in event) or None

    @property
    def training_seconds(self) -> float | None:
        """Of wall-clock time, without evaluation and waiting for compilers; all starts together.

        None where one did not say. A start that was killed does not, nor one that diverged.
        """
        starts, wholes = ([event for event in self.timing if event["event"] == kind]
                          for kind in ("start", "time_share"))
        if not wholes or len(wholes) != len(starts):
            return None
        return sum(
            whole["wall_seconds"]
            * (1 - sum(whole["time_share"][what] for what in ("evaluation", "compile")))
            for whole in wholes
        )

    @property
    def devices(self) -> set[str]:
        """What it was trained on, as "8 x TPU v3"."""
        return {f"{event['devices']} x {event['device_kind']}" for event in self.timing
                if event["event"] == "start"}


def divergence(timing: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The last event of a run's timing.jsonl if training broke down, with epoch and updates.

    Started again, such a run would break down at the same update. None where it was started since.
    """
    told = [event for event in timing if event["event"] in ("start", "diverged")]
    return told[-1] if told and told[-1]["event"] == "diverged" else None


def read_run(workdir: str | Path) -> Logs:
    """The logs of a run that is over, in a folder or in a bucket (gs://).

    Raises:
        ValueError: if the workdir holds none, or a run that has neither come to its end nor
            diverged.
    """
    with bucket.opened(workdir) as (folder, mirror):
        if mirror:
            mirror.bring_down_logs()
        events, timing = (read_events(folder / f"{name}.jsonl") for name in ("metrics", "timing"))
        if not events and not divergence(timing):
            raise ValueError(
                f"{workdir} has no metrics.jsonl with events in it: no run was made here.")
        described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    run = Logs(events, timing, described["config"], described["phases"])
    end = run.phases[-1]["end_example"]
    if not run.diverged and events[-1]["examples_seen"] != end:
        raise ValueError(
            f"{workdir} holds a run that stands at example {events[-1]['examples_seen']} of "
            f"{end}: give its command again until it has finished."
        )
    return run


def finished(runs: Sequence[Logs]) -> list[Logs]:
    """Those that did not diverge."""
    return [run for run in runs if not run.diverged]


def divergences(runs: Sequence[Logs]) -> str:
    """How many of them diverged and when, as "1 of 3 diverged at epoch 0.62"; "" for none."""
    epochs = [f"{run.diverged['epoch']:.3g}" for run in runs if run.diverged]
    return f"{len(epochs)} of {len(runs)} diverged at epoch {', '.join(epochs)}" * bool(epochs)


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


def plot_runs(
    axis: Axes, runs: Sequence[Logs], curves: Sequence[tuple[np.ndarray, np.ndarray]],
    clock: str, colour: str, name: str,
) -> np.ndarray:
    """Draws the mean and the band of the runs that finished, and each that diverged by itself.

    Args:
        axis: to draw on.
        runs: of one schedule.
        curves: x and y of each.
        clock: what x counts, epoch or updates.
        colour: of all.
        name: of the schedule, in the legend.

    Returns:
        The mean; empty where all diverged.
    """
    whole = [curve for run, curve in zip(runs, curves, strict=True) if not run.diverged]
    whole = whole or [(np.array([]), np.array([]))]
    mean, low, high = spread([values for _, values in whole])
    axis.fill_between(whole[0][0], low, high, color=colour, alpha=0.18, linewidth=0)
    told = "; ".join(filter(None, [f"{runs[0].updates:,} updates", divergences(runs)]))
    axis.plot(whole[0][0], mean, color=colour, linewidth=1.5, label=f"{name} ({told})")
    for run, (across, values) in zip(runs, curves, strict=True):
        if run.diverged:
            # Not `plot`, since its loss may be any number: the others decide how far y goes.
            axis.add_artist(Line2D(across, values, color=colour, linewidth=0.9, linestyle="--"))
            axis.plot(run.diverged[clock], 0.02, "x", color=colour, clip_on=False,
                      transform=axis.get_xaxis_transform())
    return mean


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
            whole = [epochs for run, (epochs, _) in zip(runs, curves, strict=True)
                     if not run.diverged]
            if any(not np.array_equal(epochs, whole[0]) for epochs in whole):
                raise ValueError(f"the runs of {name} were logged at different epochs.")
            by_update = [(at_updates(run, epochs), values)
                         for run, (epochs, values) in zip(runs, curves, strict=True)]
            for axis, clock, across in zip(
                axes[row], ("epoch", "updates"), (curves, by_update), strict=True
            ):
                plot_runs(axis, runs, across, clock, colour, name)
    longest = max(schedules.values(), key=lambda runs: len(runs[0].phases))[0]
    for phase in longest.phases[1:]:
        for axis in axes[:, 0]:  # where the noise falls
            axis.axvline(phase["start_example"] / longest.examples, color="black", alpha=0.3,
                         linewidth=0.8, linestyle=":")
    axes[0][0].set_yscale("log")
    axes[0][0].set_ylabel("train loss")
    axes[1][0].set_ylabel("test accuracy")
    lowest = min((
        np.median(epoch_means([e for e in run.events if "test_accuracy" in e], "test_accuracy")[1])
        for runs in schedules.values() for run in finished(runs)
    ), default=0.5)
    axes[1][0].set_ylim(
        max(0.0, lowest - 2 * (1 - lowest)), min(1.0, lowest + 1.1 * (1 - lowest)))
    for axis, label in zip(axes[1], ("epochs", "parameter updates"), strict=True):
        axis.set_xlabel(label)
        axis.set_xlim(left=0)
    axes[0][0].legend(frameon=False, fontsize=8)
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
        finals = [100 * run.events[-1]["test_accuracy"] for run in finished(runs)]
        deviation = f" ± {statistics.stdev(finals):.2f}" if len(finals) > 1 else ""
        final = [f"{statistics.mean(finals):.2f}{deviation} %" if finals else "", divergences(runs)]
        seconds = [run.seconds for run in runs if run.seconds]
        took = f"{statistics.mean(seconds):.1f}" if seconds else "not recorded"
        lines.append(
            f"| {name} | {len(runs)} | {'; '.join(filter(None, final))} | {runs[0].updates:,} | "
            f"{took} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Draws what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--output", required=True, type=Path, help="folder for the results")
    parser.add_argument("--title", default="")
    parser.add_argument("schedules", nargs="+", metavar="NAME=DIR,DIR", help="runs by schedule")
    options = parser.parse_args()
    with one_line_errors("experiments.curves"):
        schedules = {}
        for text in options.schedules:
            name, equals, folders = text.partition("=")
            if not (name and equals and folders):
                raise ValueError(f"{text!r} is no NAME=DIR,DIR.")
            schedules[name] = [read_run(folder) for folder in folders.split(",")]
        options.output.mkdir(parents=True, exist_ok=True)
        draw(schedules, options.output / "curves.png", options.title)
        (options.output / "table.md").write_text(table(schedules), encoding="utf-8")
    print(table(schedules), end="")


if __name__ == "__main__":
    main()
