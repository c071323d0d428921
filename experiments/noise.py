"""The measured noise scale along runs: beside the batch, and by the norms beside all parameters.

A scale is one ratio: both of its parts are averaged over all that the seeds of a curve measured
between two positions, and then divided. Where the mean of |G|^2 is less than twice its standard
error, it is not told from 0, and the scale has a lower end only. Ratios of shorter stretches are
never averaged: those that are known are the ones in which |G|^2 came out large, so that their mean
would be too low.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Picture

from bigbatch import schedule
from bigbatch.config import make_recipe
from experiments.drawing import COLOURS
from experiments.figures import Figure
from experiments.logs import Logs, filled, finished
from experiments.tables import Results, Table

STRETCHES = 10  # of a run, or a few more, since they end where phases do
ERRORS = 2.0  # standard errors: half of an interval, and what |G|^2 must be over 0 by
WITHIN = 2.0  # a ratio between its inverse and itself is counted as agreement


class Scale(NamedTuple):
    """A noise scale in examples, with its interval of ERRORS standard errors on either side."""

    value: float  # nan where |G|^2 is not told from 0
    low: float  # nan where nothing is known
    high: float  # infinite where |G|^2 is not told from 0
    measurements: int


class Stretch(NamedTuple):
    """A part of a run with one batch."""

    start: int  # example
    end: int  # example
    batch: int
    predicted: float  # the noise that the schedule states in its middle, of that at its peak


def stretches(run: Logs) -> list[Stretch]:
    """A run, cut where its phases end and into parts of about a tenth."""
    whole, recipe, found = run.phases[-1]["end_example"], make_recipe(filled(run)), []
    for phase in run.phases:
        start, end = phase["start_example"], phase["end_example"]
        parts = max(1, round((end - start) / whole * STRETCHES))
        edges = [start + (end - start) * part // parts for part in range(parts + 1)]
        found += [
            Stretch(first, last, phase["batch_size"],
                    schedule.stated_noise(recipe, (first + last) // 2))
            for first, last in itertools.pairwise(edges)]
    return found


def pooled(runs: Sequence[Logs], name: str, start: int, end: int) -> Scale:
    """The scale of all that runs measured between two examples.

    Args:
        runs: seeds of one curve.
        name: "noise_full", by all parameters; "noise_norms", by scales and biases of the norms, of
            the same ghost batches; or "noise", the same of the updates that have a line.
        start: the first example.
        end: the last one.
    """
    keys = f"{name}_gradient_square", f"{name}_trace"
    parts = np.array([[event[key] for key in keys] for run in runs for event in run.events
                      if start < event["examples_seen"] <= end
                      and all(event.get(key) is not None for key in keys)])
    if len(parts) < 2:
        return Scale(math.nan, math.nan, math.inf, len(parts))
    square, trace = parts.mean(axis=0)
    (squares, both), (_, traces) = ERRORS**2 * np.cov(parts.T) / len(parts)
    # In the interval are the ratios r of which trace - r square is 0 within its own error (Fieller
    # 1954): those between the roots of a r^2 - 2 b r + c, or above one where the other is below 0.
    a, b, c = square**2 - squares, trace * square - both, trace**2 - traces
    root = math.sqrt(b**2 - a * c) if b**2 >= a * c else math.nan
    known = a > 0 and square > 0 and trace > 0
    low = (b - root) / a
    return Scale(trace / square if known else math.nan, low if low > 0 else math.nan,
                 (b + root) / a if known else math.inf, len(parts))


class Fit(NamedTuple):
    """log(full) = log(factor) + power log(norms), by least squares over stretches of runs."""

    factor: float
    power: float
    spread: float  # the factor by which the full scale is usually off the fit: exp(deviation)
    correlation: float  # of the logarithms
    ratios: tuple[float, float, float]  # norms / full: the lowest, the median and the highest
    agree: float  # the share of stretches whose ratio lies between 1 / WITHIN and WITHIN
    points: int
    without: int  # stretches in which one of the two is not known


def pairs(run: Logs) -> list[tuple[float, float]]:
    """The values by the norms and by all parameters in a run's stretches; nan where not known."""
    return [tuple(pooled([run], f"noise_{name}", stretch.start, stretch.end).value
                  for name in ("norms", "full")) for stretch in stretches(run)]


def fit(found: Sequence[tuple[float, float]]) -> Fit | None:
    """The fit over `pairs` of which both are known; None if they are fewer than 3."""
    norms, full = np.reshape(found, (-1, 2)).T
    known = np.isfinite(norms) & np.isfinite(full)
    if known.sum() < 3:
        return None
    x, y = np.log(norms[known]), np.log(full[known])
    power, level = np.polyfit(x, y, 1)
    rest = y - level - power * x
    ratios = np.exp(x - y)
    return Fit(
        math.exp(level), float(power), float(np.exp(rest.std(ddof=2))),
        float(np.corrcoef(x, y)[0, 1]),
        tuple(float(value) for value in np.quantile(ratios, (0.0, 0.5, 1.0))),
        float(np.mean(np.abs(np.log(ratios)) <= math.log(WITHIN))), int(known.sum()),
        int((~known).sum()))


def draw(figure: Figure, scale: str, results: Results) -> Picture:
    """The scales along the runs beside their batches, and the scale by the norms beside the full.

    On the left a point is a stretch of all seeds, with its interval, or an arrow up from its lower
    end where no more is known. On the right a point is a run's stretch.
    """
    (panel,) = figure.panels
    picture = Picture(figsize=(11, 4.8), layout="constrained")
    along, beside = picture.subplots(1, 2)
    everything = []
    for colour, curve in zip(COLOURS, panel.curves, strict=False):
        if runs := finished(results[curve.config]):
            _draw_along(along, runs, colour, curve.label)
            found = [pair for run in runs for pair in pairs(run)]
            beside.plot(*np.transpose(found), "o", color=colour, markersize=4, alpha=0.7)
            everything += found
    along.set(yscale="log", xlabel="epochs", ylabel="examples", xlim=(0, None))
    picture.legend(*along.get_legend_handles_labels(), frameon=False, fontsize=7,
                   loc="outside lower center", ncols=len(panel.curves))
    known = np.ravel(everything)
    known = known[np.isfinite(known)]
    ends = np.array([known.min() / 1.5, known.max() * 1.5] if known.size else [1.0, 10.0])
    beside.plot(ends, ends, color="black", linewidth=0.8, label="equal")
    beside.fill_between(ends, ends / WITHIN, ends * WITHIN, color="black", alpha=0.07, linewidth=0,
                        label=f"within a factor of {WITHIN:g}")
    if fitted := fit(everything):
        beside.plot(ends, fitted.factor * ends**fitted.power, ":", color="black",
                    label=f"{fitted.factor:.2g} x (norms)^{fitted.power:.2f}")
    beside.set(xscale="log", yscale="log", xlabel="noise scale by the norms, examples",
               ylabel="by all parameters", xlim=ends, ylim=ends)
    beside.legend(frameon=False, fontsize=8)
    return picture


def _draw_along(axis: Axes, runs: Sequence[Logs], colour: str, label: str) -> None:
    """The batch and the scales of one curve's stretches, each in its middle."""
    cut, examples = stretches(runs[0]), runs[0].examples
    epochs = np.array([(stretch.start + stretch.end) / 2 / examples for stretch in cut])
    value, low, high, _ = np.transpose(
        [pooled(runs, "noise_full", stretch.start, stretch.end) for stretch in cut])
    axis.plot(epochs, value, "-", color=colour, linewidth=1.4, label=f"{label}: measured")
    known = np.isfinite(value)
    axis.errorbar(epochs[known], value[known], np.array([value - low, high - value])[:, known],
                  fmt="o", color=colour, markersize=3, elinewidth=0.8, alpha=0.6)
    axis.plot(epochs[~known], low[~known], "^", color=colour, markersize=6, fillstyle="none")
    norms = [pooled(runs, "noise_norms", stretch.start, stretch.end).value for stretch in cut]
    axis.plot(epochs, norms, "--", color=colour, linewidth=1.4, label=f"{label}: by the norms")
    if known.any():
        predicted = np.array([stretch.predicted for stretch in cut])
        first = np.argmax(np.where(known, predicted, 0.0))  # at the peak, after a warm-up
        axis.plot(epochs, value[first] * predicted[first] / predicted, ":", color=colour,
                  linewidth=1, label=f"{label}: as 1/(predicted noise)")
    axis.stairs([stretch.batch for stretch in cut],
                [0, *(stretch.end / examples for stretch in cut)], baseline=None, color=colour,
                linewidth=3, alpha=0.3, label=f"{label}: its batch")


def tables(figure: Figure, scale: str, results: Results) -> list[Table]:
    """For each curve its scales beside its batches, and what the fit says.

    A row is all that was measured under one batch and one noise; where the noise falls smoothly, a
    stretch.
    """
    (panel,) = figure.panels
    cells, everything = [], []
    for curve in panel.curves:
        runs = finished(results[curve.config])
        everything += [pair for run in runs for pair in pairs(run)]
        for (batch, predicted), group in itertools.groupby(
                stretches(runs[0]) if runs else [],
                lambda stretch: (stretch.batch, stretch.predicted)):
            inside = list(group)
            start, end = inside[0].start, inside[-1].end
            full, norms = (pooled(runs, name, start, end) for name in ("noise_full", "noise_norms"))
            cells.append([
                curve.label, " to ".join(f"{at / runs[0].examples:.3g}" for at in (start, end)),
                _told(predicted), f"{batch:,}", str(full.measurements), _interval(full),
                _told(batch / full.value), _told(norms.value / full.value)])
    fitted = fit(everything)
    note = ("Predicted noise: of that at the recipe's peak. Scales are in examples: both parts are "
            "averaged over n measurements of all seeds and divided, and in brackets is the "
            f"interval of {ERRORS:g} standard errors. Over: |G|^2 is less than {ERRORS:g} standard "
            "errors above 0, so that only the interval's lower end is known.")
    if fitted:
        low, median, high = fitted.ratios
        note += (
            f" The scale by the norms is {low:.2g} to {high:.2g} times the full one, {median:.2g} "
            f"in the median, and within a factor of {WITHIN:g} in {fitted.agree:.0%} of "
            f"{fitted.points} stretches of runs; in {fitted.without} more, one of the two is not "
            f"known. The fit: full = {fitted.factor:.2g} x (by the norms)^{fitted.power:.2f}, off "
            f"by a factor of {fitted.spread:.2f}; the logarithms' correlation is "
            f"{fitted.correlation:.3f}.")
    return [Table(panel.name, ["curve", "epochs", "predicted noise", "batch", "n",
                               "measured noise scale", "batch / scale", "by the norms / full"],
                  cells, note)]


def _interval(scale: Scale) -> str:
    if math.isfinite(scale.value):
        return f"{_told(scale.value)} ({_told(scale.low)} to {_told(scale.high)})"
    return "over " * math.isfinite(scale.low) + _told(scale.low)


def _told(number: float) -> str:
    """Three digits, and a comma between thousands as everywhere in the tables."""
    if not math.isfinite(number):
        return "not known"
    return f"{float(f'{number:.3g}'):,.0f}" if abs(number) >= 100 else f"{number:.3g}"
