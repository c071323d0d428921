"""The paper's figures, drawn from runs, with the paper's own points.

Lines are means over seeds, bands go from the lowest to the highest value, and dotted lines mark
where the noise falls. At the paper's scale its points lie over our curves. At other scales they
have axes of their own below ours, since only the shape can be compared. A run that diverged is in
no mean: it is a dashed line, with a cross on the axis where it diverged. Runs that decide when
their batch grows take other numbers of updates, so against updates each of them is a line.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Picture
from matplotlib.lines import Line2D

from bigbatch.dotted import resolve
from experiments import digitised
from experiments.figures import SCALES, Figure, Panel, config_text, planned
from experiments.logs import Logs, divergences, finished, updates_of
from experiments.tables import Results, label_of, lost_epochs_of, recipe_updates

COLOURS = ("#3b6fb6", "#d9822b", "#3a9a5b", "#8a4fa3", "#b6403b", "#6b6b6b", "#c2a415")
AXES = {"epoch": "epochs", "token": "tokens", "update": "parameter updates"}
# As events name them.
CLOCKS = {"epoch": "epoch", "token": "tokens_seen", "update": "updates"}
# The paper's axes where its plots give them, and wide enough for its points elsewhere.
PAPER_LIMITS = {
    "cifar10": {"train_loss": (0.0, 0.8), "test_accuracy": (0.80, 0.96)},
    "imagenet_inception_resnet_v2": {"test_accuracy": (0.4, 0.8)},
    "imagenet_resnet50": {"test_accuracy": (0.4, 0.8)},
}
LOSS_POINTS = 40  # over a run; a single batch's loss is noisy


def points(run: Logs, quantity: str, axis: str = "epoch") -> tuple[np.ndarray, np.ndarray]:
    """Positions on an axis (epoch or update) and values of a quantity there.

    What is tested is of each evaluation; what is measured in training is averaged over stretches.
    """
    events = [event for event in run.events if quantity in event]
    epoch, across, value = (np.array([event[name] for event in events], float)
                            for name in ("epoch", CLOCKS[axis], quantity))
    if not quantity.startswith("train_"):
        return across, value
    stretch = np.ceil(epoch / epoch.max(initial=0.0) * LOSS_POINTS).astype(int)
    inside = [stretch == number for number in np.unique(stretch)]
    return tuple(np.array([column[rows].mean() for rows in inside]) for column in (across, value))


def _diverged_at(run: Logs, axis: str) -> float:
    """The place on an axis where a run diverged. What notes it has no tokens."""
    if axis != "token":
        return run.diverged[CLOCKS[axis]]
    known = run.events[-1:] or [{"tokens_seen": 0, "examples_seen": 1}]
    return run.diverged["examples_seen"] * known[0]["tokens_seen"] / known[0]["examples_seen"]


def colours(count: int) -> list[Any]:
    """As many colours: a few that are easily told apart, or else any number from a rainbow."""
    if count <= len(COLOURS):
        return list(COLOURS[:count])
    return list(matplotlib.colormaps["turbo"](np.linspace(0.03, 0.97, count)))


def draw(figure: Figure, scale: str | None, results: Results) -> Picture:
    """The picture of `figure`; a scale of None for a user's own runs."""
    picture = resolve(figure.draw, "the figure's draw")(figure, scale, results)
    for axis in picture.axes:
        axis.spines[["top", "right"]].set_visible(False)
    return picture


def curves(figure: Figure, scale: str | None, results: Results) -> Picture:
    """Lines against epochs or updates, with a row of axes for each quantity."""
    overlaid = scale is not None and SCALES[scale].comparable and figure.papers
    plotted = {stretch.panel for stretch in digitised.read()}
    beside = not overlaid and any(panel.name in plotted for panel in figure.panels)
    rows = [list(row) for _, row in itertools.groupby(
        figure.panels, key=lambda panel: panel.quantity)]
    picture, axes_RxC = _axes(len(rows) * (1 + beside), len(rows[0]))
    for axis, panel in zip(axes_RxC.flat, figure.panels, strict=False):
        lows, highs = [], []
        for colour, curve in zip(colours(len(panel.curves)), panel.curves, strict=True):
            mean = plot_runs(axis, panel, results[curve.config], colour, curve.label)
            if len(mean):
                lows.append(np.quantile(mean, 0.08))
                highs.append(mean.max())
        if panel.axis == "epoch":
            most = max((results[curve.config][0] for curve in panel.curves),
                       key=lambda run: len(run.phases) * (not run.decides))
            for phase in most.phases[1:] if not most.decides else []:
                axis.axvline(phase["start_example"] / most.examples, color="black", alpha=0.3,
                             linewidth=0.8, linestyle=":")
        axis.set_yscale(panel.scale)
        if overlaid:
            _draw_paper(axis, panel, 2.6, 0.55)
            bottom, top = PAPER_LIMITS[panel.family][panel.quantity]
            axis.set_ylim(min([bottom, *lows]), top)
        elif panel.quantity == "test_loss" and highs:  # the second half, where curves part
            ends = [float(np.quantile(line.get_ydata(), share)) for line in axis.lines
                    for share in (0.0, 0.5)]
            axis.set_ylim(min(ends) - 0.02, max(ends))
        elif panel.quantity == "test_accuracy" and highs:
            room = 0.06 * (max(highs) - min(lows))
            axis.set_ylim(min(lows) - room, max(highs) + 3 * room)
        _finish(axis, panel)
    if beside:
        for below, panel in zip(axes_RxC[1], figure.panels, strict=True):
            _draw_paper(below, panel, 2.2, 1.0)
            if not below.lines:
                below.set_axis_off()
                continue
            below.set_ylim(PAPER_LIMITS[panel.family][panel.quantity])
            _finish(below, panel)
            stated = any(curve.finals for curve in panel.curves)
            below.set_title("the paper's, read off its plots" + "; diamonds: as it states" * stated,
                            fontsize=9)
    if scale is None:
        picture.suptitle(figure.title)
    return picture


def plot_runs(
    axis: Axes, panel: Panel, runs: Sequence[Logs], colour: Any, name: str
) -> np.ndarray:
    """Draws the mean and the band of the runs that finished, and each run that diverged by itself.

    Runs that stand at other places of the axis are each drawn by itself, too.

    Args:
        axis: to draw on.
        panel: has the quantity and what it is drawn against.
        runs: of one schedule.
        colour: of all runs.
        name: of the schedule, in the legend.

    Returns:
        The mean; empty where all runs diverged. Of runs that are drawn by themselves, all values.
    """
    lines = [points(run, panel.quantity, panel.axis) for run in runs]
    whole = [line for run, line in zip(runs, lines, strict=True) if not run.diverged]
    told = "; ".join(filter(None, [f"{updates_of(runs)} updates", divergences(runs)]))
    label = f"{name} ({told})"
    if len({tuple(across) if panel.axis == "update" else len(across) for across, _ in whole}) > 1:
        for across, values in whole:
            axis.plot(across, values, color=colour, linewidth=0.9, label=label)
            label = None
        mean = np.concatenate([values for _, values in whole])
    else:
        places, rows = np.moveaxis(whole, 1, 0) if whole else ([[]], [[]])
        mean = _plot_band(axis, np.mean(places, axis=0), rows, color=colour, linewidth=1.5,
                          label=label)
    for run, (across, values) in zip(runs, lines, strict=True):
        if run.diverged:
            # Not `plot`, since its loss may be any number: the other runs decide y's limits.
            axis.add_artist(Line2D(across, values, color=colour, linewidth=0.9, linestyle="--"))
            axis.plot(_diverged_at(run, panel.axis), 0.02, "x", color=colour, clip_on=False,
                      transform=axis.get_xaxis_transform())
    return mean


def _plot_band(
    axis: Axes, across: Sequence[float], rows: Sequence[Sequence[float]], **line: Any
) -> np.ndarray:
    """Draws the mean of rows and a band from the lowest to the highest value; returns the mean."""
    mean = np.mean(rows, axis=0)
    axis.fill_between(across, np.min(rows, axis=0), np.max(rows, axis=0), color=line["color"],
                      alpha=0.18, linewidth=0)
    axis.plot(across, mean, **line)
    return mean


def _draw_paper(axis: Axes, panel: Panel, width: float, alpha: float) -> None:
    """The paper's points: means of its curves over stretches of the axis, and their ends."""
    for colour, curve in zip(colours(len(panel.curves)), panel.curves, strict=True):
        label = f"{curve.label} (paper)"
        for found in digitised.read():
            if found.panel == panel.name and found.curve in curve.plotted:
                axis.plot([found.start, found.end], [found.mean] * 2, color=colour, alpha=alpha,
                          linewidth=width, solid_capstyle="butt", label=label)
                label = None
        if curve.finals and panel.quantity == "test_accuracy":
            end = recipe_updates(panel, curve) if panel.axis == "update" else planned(
                config_text("paper", panel, curve, 0))[0].recipe.epochs
            axis.plot([end] * len(curve.finals), curve.finals, "D", color=colour, alpha=alpha,
                      markersize=4, label=label)
    axis.set_xlim(left=0)


def schedules(figure: Figure, scale: str, results: Results) -> Picture:
    """Learning rate, batch size and noise scale of each curve against epochs, without any run."""
    picture, axes_RxC = _axes(1, 3)
    (panel,) = figure.panels
    labels = {"learning_rate": "learning rate", "batch_size": "batch size",
              "noise_scale_approximate": "noise scale εN/(B(1−m))"}
    for axis, (name, label) in zip(axes_RxC[0], labels.items(), strict=True):
        for number, curve in enumerate(panel.curves):
            config, phases = planned(config_text(scale, panel, curve, 0))
            edges = np.array([phases[0].start_example, *(phase.end_example for phase in phases)])
            # Thinner above thicker, so that curves that coincide all show.
            axis.stairs([getattr(phase, name) for phase in phases],
                        edges / config.data.train_examples, baseline=None, color=COLOURS[number],
                        linewidth=5 - 1.7 * number, label=curve.label)
        axis.set(yscale="log", ylabel=label, xlabel="epochs", xlim=(0, None))
        axis.legend(frameon=False, fontsize=8)
    return picture


def lost_epochs(figure: Figure, scale: str, results: Results) -> Picture:
    """Training losses, and how many epochs each momentum's lag behind the first's."""
    picture, (axes,) = _axes(1, 2)
    (panel,) = figure.panels
    of_curves = colours(len(panel.curves))
    for colour, curve in zip(of_curves, panel.curves, strict=True):
        plot_runs(axes[0], panel, results[curve.config], colour, curve.label)
    _finish(axes[0], panel)
    for colour, row in zip(of_curves[1:], lost_epochs_of(panel, results), strict=True):
        if len(row.lost_SxT):
            _plot_band(axes[1], row.trained_T, row.lost_SxT, color=colour, linewidth=1.4,
                       label=row.label)
        axes[1].plot(row.trained_T, row.predicted_T, color=colour, linewidth=1.4, linestyle=":")
    axes[1].plot([], [], color="black", linestyle=":", label="predicted")
    axes[1].set(xlabel=AXES[panel.axis], ylabel="epochs lost", xlim=(0, None))
    axes[1].legend(frameon=False, fontsize=8)
    return picture


def initial_rate(figure: Figure, scale: str, results: Results) -> Picture:
    """Final accuracy against the first learning rate."""
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


def _finish(axis: Axes, panel: Panel) -> None:
    axis.set(xlabel=AXES[panel.axis], ylabel=label_of(panel.quantity), xlim=(0, None))
    axis.set_title(panel.title, fontsize=10)
    if panel.axis == "update":
        axis.xaxis.set_major_formatter("{x:,.0f}")
    if axis.get_legend_handles_labels()[0]:
        falls = panel.quantity == "test_loss"  # which leaves room below its lines only
        axis.legend(frameon=False, fontsize=8, loc="lower left" if falls else "best")
