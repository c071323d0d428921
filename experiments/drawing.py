"""The paper's figures, drawn from runs, with the paper's own points.

Lines are means over seeds, bands go from the lowest to the highest, dotted lines stand where the
noise falls. At the paper's scale its points lie over our curves. At another one they have axes of
their own below ours, since only the shape can be compared. A run that diverged is in no mean: it is
a dashed line, with a cross at the axis where it broke down.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Picture

from bigbatch.config import make_phases
from experiments.curves import COLOURS, Logs, divergences, finished, plot_runs, spread
from experiments.figures import SCALES, Figure, Panel, config_text, load_config, read_digitised
from experiments.tables import LABELS, Results, lost_epochs_of

AXES = {"epoch": "epochs", "update": "parameter updates"}
# The paper's axes where its plots give them, and wide enough for its points elsewhere.
PAPER_LIMITS = {
    "cifar10": {"train_loss": (0.0, 0.8), "test_accuracy": (0.80, 0.96)},
    "imagenet_inception_resnet_v2": {"test_accuracy": (0.4, 0.8)},
    "imagenet_resnet50": {"test_accuracy": (0.4, 0.8)},
}
LOSS_POINTS = 40  # over a run; a single batch's loss is noisy


class Points(NamedTuple):
    """A run's values of one quantity."""

    epoch: np.ndarray
    updates: np.ndarray
    value: np.ndarray


def points(run: Logs, quantity: str) -> Points:
    """What was measured: each evaluation, or the training loss averaged over stretches."""
    events = [event for event in run.events if quantity in event]
    epoch, updates, value = (
        np.array([event[name] for event in events], float)
        for name in ("epoch", "updates", quantity)
    )
    if quantity == "train_loss":
        stretch = np.ceil(epoch / epoch.max(initial=0.0) * LOSS_POINTS).astype(int)
        inside = [stretch == number for number in np.unique(stretch)]
        epoch, updates, value = (
            np.array([column[rows].mean() for rows in inside]) for column in (epoch, updates, value)
        )
    return Points(epoch, updates, value)


def draw(figure: Figure, scale: str, results: Results, path: Path) -> None:
    """Draws `figure` into `path` (.png or .svg)."""
    make(figure, scale, results).savefig(path, dpi=110)


def make(figure: Figure, scale: str, results: Results) -> Picture:
    """The picture of `figure`."""
    kinds = {"curves": _curves, "schedules": _schedules, "lost_epochs": _lost_epochs,
             "initial_rate": _initial_rate}
    picture = kinds[figure.kind](figure, scale, results)
    for axis in picture.axes:
        axis.spines[["top", "right"]].set_visible(False)
    return picture


def _curves(figure: Figure, scale: str, results: Results) -> Picture:
    overlaid = SCALES[scale].comparable
    plotted = {stretch.panel for stretch in read_digitised()}
    beside = not overlaid and any(panel.name in plotted for panel in figure.panels)
    picture, axes_RxC = _axes(1 + beside, len(figure.panels))
    for column, panel in enumerate(figure.panels):
        axis = axes_RxC[0][column]
        lows, highs = [], []
        for colour, curve in zip(COLOURS, panel.curves, strict=False):
            mean = _plot(axis, panel, results[curve.config], colour, curve.label)
            if len(mean):
                lows.append(np.quantile(mean, 0.08))
                highs.append(mean.max())
        if panel.axis == "epoch":
            _mark_falls(axis, results[panel.curves[0].config][0])
        if overlaid:
            _draw_paper(axis, panel, 2.6, 0.55)
            axis.set_ylim(PAPER_LIMITS[panel.family][panel.quantity])
        elif panel.quantity == "test_accuracy" and highs:
            room = 0.06 * (max(highs) - min(lows))
            axis.set_ylim(min(lows) - room, max(highs) + 3 * room)
        _finish(axis, panel)
        if beside:
            below = axes_RxC[1][column]
            _draw_paper(below, panel, 2.2, 1.0)
            below.set_ylim(PAPER_LIMITS[panel.family][panel.quantity])
            _finish(below, panel)
            below.set_title("the paper's, read off its plots", fontsize=9)
    return picture


def _draw_paper(axis: Axes, panel: Panel, width: float, alpha: float) -> None:
    """The paper's points: means of its curves over stretches of the axis."""
    for colour, curve in zip(COLOURS, panel.curves, strict=False):
        label = f"{curve.label} (paper)"
        for found in read_digitised():
            if found.panel == panel.name and found.curve in curve.plotted:
                axis.plot([found.start, found.end], [found.mean] * 2, color=colour, alpha=alpha,
                          linewidth=width, solid_capstyle="butt", label=label)
                label = None
    axis.set_xlim(left=0)


def _schedules(figure: Figure, scale: str, results: Results) -> Picture:
    picture, axes_RxC = _axes(1, 3)
    (panel,) = figure.panels
    for number, (colour, curve) in enumerate(zip(COLOURS, panel.curves, strict=False)):
        config = load_config(config_text(scale, panel, curve, 0))
        phases, examples = make_phases(config), config.data.train_examples
        edges = [phase.start_example / examples for phase in phases]
        edges.append(phases[-1].end_example / examples)
        for axis, name in zip(axes_RxC[0], ("learning_rate", "batch_size",
                                            "noise_scale_approximate"), strict=True):
            # Thinner above thicker, so that curves that coincide all show.
            axis.stairs([getattr(phase, name) for phase in phases], edges, baseline=None,
                        color=colour, linewidth=5 - 1.7 * number, label=curve.label)
    for axis, label in zip(axes_RxC[0], ("learning rate", "batch size",
                                         "noise scale εN/(B(1−m))"), strict=True):
        axis.set(yscale="log", ylabel=label, xlabel="epochs", xlim=(0, None))
        axis.legend(frameon=False, fontsize=8)
    return picture


def _lost_epochs(figure: Figure, scale: str, results: Results) -> Picture:
    picture, (axes,) = _axes(1, 2)
    (panel,) = figure.panels
    for colour, curve in zip(COLOURS, panel.curves, strict=False):
        _plot(axes[0], panel, results[curve.config], colour, curve.label)
    _finish(axes[0], panel)
    for colour, row in zip(COLOURS[1:], lost_epochs_of(panel, results), strict=False):
        if len(row.worth_SxT):
            mean, low, high = spread([row.trained - worth for worth in row.worth_SxT])
            axes[1].fill_between(row.trained, low, high, color=colour, alpha=0.18, linewidth=0)
            axes[1].plot(row.trained, mean, color=colour, linewidth=1.4, label=row.label)
        axes[1].plot(row.trained, row.trained - row.predicted_T, color=colour, linewidth=1.4,
                     linestyle=":")
    axes[1].plot([], [], color="black", linestyle=":", label="predicted")
    axes[1].set(xlabel=AXES[panel.axis], ylabel="epochs lost", xlim=(0, None))
    axes[1].legend(frameon=False, fontsize=8)
    return picture


def _initial_rate(figure: Figure, scale: str, results: Results) -> Picture:
    picture, ((axis,),) = _axes(1, 1)
    (panel,) = figure.panels
    rates, means = [], []
    for curve in panel.curves:
        runs = results[curve.config]
        rate = runs[0].phases[0]["learning_rate"]
        finals = [run.events[-1][panel.quantity] for run in finished(runs)]
        axis.plot([rate] * len(finals), finals, "o", color=COLOURS[0], alpha=0.4, markersize=4)
        if told := divergences(runs):
            axis.plot(rate, 0.02, "x", color=COLOURS[0], clip_on=False, label=f"{rate:g}: {told}",
                      transform=axis.get_xaxis_transform())
            axis.legend(frameon=False, fontsize=8)
        rates.append(rate)
        means.append(np.mean(finals) if finals else np.nan)
    axis.plot(rates, means, color=COLOURS[0])
    axis.set(xscale="log", xlabel="initial learning rate", ylabel="final test accuracy")
    axis.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axis.minorticks_off()
    return picture


def _axes(rows: int, columns: int) -> tuple[Picture, np.ndarray]:
    picture = Picture(figsize=(max(5.5 * columns, 6.5) if columns < 3 else 12, 4.0 * rows),
                      layout="constrained")
    return picture, picture.subplots(rows, columns, squeeze=False)


def _plot(axis: Axes, panel: Panel, runs: Sequence[Logs], colour: str, name: str) -> np.ndarray:
    """See `plot_runs`."""
    clock = {"epoch": "epoch", "update": "updates"}[panel.axis]
    of_seeds = [points(run, panel.quantity) for run in runs]
    return plot_runs(
        axis, runs, [(getattr(found, clock), found.value) for found in of_seeds], clock, colour,
        name)


def _mark_falls(axis: Axes, run: Logs) -> None:
    for phase in run.phases[1:]:
        axis.axvline(phase["start_example"] / run.examples, color="black", alpha=0.3, linewidth=0.8,
                     linestyle=":")


def _finish(axis: Axes, panel: Panel) -> None:
    axis.set(xlabel=AXES[panel.axis], ylabel=LABELS[panel.quantity], xlim=(0, None))
    axis.set_title(panel.title, fontsize=10)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False, fontsize=8)
