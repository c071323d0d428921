"""The measured noise scale along runs: beside the batch, and by the norms beside all parameters.

A scale is averaged over stretches of a run: both of its parts over what was measured there, and
then divided. Where the mean of |G|^2 is less than twice its standard error, it is not told from 0,
and the stretch has no scale.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure as Picture

from bigbatch import schedule
from bigbatch.config import make_recipe
from experiments.drawing import COLOURS
from experiments.figures import Figure
from experiments.logs import Logs, filled, finished
from experiments.tables import Results, Table

STRETCHES = 10  # of a run
LEVELS = 5  # of batch and noise, at most, that have a row each
ERRORS = 2.0  # standard errors that |G|^2 must be over 0
WITHIN = 2.0  # a ratio between its inverse and itself is counted as agreement


class Scales(NamedTuple):
    """Noise scales over stretches of a run, in examples; nan where there is none."""

    epoch: np.ndarray  # the middle of each stretch
    batch: np.ndarray  # of the schedule, there
    predicted: np.ndarray  # the noise that the schedule states there, of that at its peak
    full: np.ndarray  # by all parameters
    norms: np.ndarray  # by scales and biases of the norms, of the same ghost batches
    updates: np.ndarray  # the same of the updates of which a line was logged


def scales(run: Logs) -> Scales:
    """What a run measured, with `noise.every_epochs` and in its updates."""
    end = run.phases[-1]["end_example"]
    middles = (np.arange(STRETCHES) + 0.5) / STRETCHES * end
    batches = [next(phase["batch_size"] for phase in run.phases if middle < phase["end_example"])
               for middle in middles]
    recipe = make_recipe(filled(run))
    at = [next(event for event in run.events if event["examples_seen"] >= middle)
          for middle in middles]
    predicted = [schedule.noise(recipe, event["learning_rate"], event["batch_size"])
                 for event in at]
    return Scales(middles / run.examples, np.array(batches), np.array(predicted), *(
        np.array([_scale(run, name, stretch / STRETCHES * end, (stretch + 1) / STRETCHES * end)
                  for stretch in range(STRETCHES)])
        for name in ("noise_full", "noise_norms", "noise")))


def _scale(run: Logs, name: str, start: float, end: float) -> float:
    """The scale of the parts that fields of metrics.jsonl have between two positions; or nan."""
    keys = f"{name}_gradient_square", f"{name}_trace"
    parts = np.array([[event[key] for key in keys] for event in run.events
                      if start < event["examples_seen"] <= end
                      and all(event.get(key) is not None for key in keys)])
    if len(parts) < 2:
        return math.nan
    square, trace = parts.mean(axis=0)
    error = parts[:, 0].std(ddof=1) / math.sqrt(len(parts))
    return trace / square if square > ERRORS * error and trace > 0 else math.nan


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


def fit(found: Sequence[Scales]) -> Fit | None:
    """The fit over all stretches in which both scales are known; None if they are fewer than 3."""
    norms, full = (np.concatenate([getattr(one, name) for one in found])
                   for name in ("norms", "full"))
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

    A line is the geometric mean over seeds, and a point a run's stretch.
    """
    (panel,) = figure.panels
    picture = Picture(figsize=(11, 4.2), layout="constrained")
    along, beside = picture.subplots(1, 2)
    everything = []
    for colour, curve in zip(COLOURS, panel.curves, strict=False):
        runs = finished(results[curve.config])
        found = [scales(run) for run in runs]
        if not found:
            continue
        everything += found
        for name, style, told in (("full", "-", "measured"), ("norms", "--", "by the norms")):
            values = [getattr(one, name) for one in found]
            along.plot(found[0].epoch, _means(values), style, color=colour, linewidth=1.4,
                       label=f"{curve.label}: {told}")
            if name == "full":
                for value in values:
                    along.plot(found[0].epoch, value, "o", color=colour, alpha=0.35, markersize=3)
        level = _means([one.full for one in found])
        if len(known := np.flatnonzero(np.isfinite(level))):
            growth = found[0].predicted[known[0]] / found[0].predicted
            along.plot(found[0].epoch, level[known[0]] * growth, ":", color=colour, linewidth=1,
                       label=f"{curve.label}: as 1/(predicted noise)")
        phases = runs[0].phases
        along.stairs([phase["batch_size"] for phase in phases],
                     [end / runs[0].examples for end in
                      (0, *(phase["end_example"] for phase in phases))],
                     baseline=None, color=colour, linewidth=3, alpha=0.3,
                     label=f"{curve.label}: its batch")
        for one in found:
            beside.plot(one.norms, one.full, "o", color=colour, markersize=4, alpha=0.7)
    along.set(yscale="log", xlabel="epochs", ylabel="examples", xlim=(0, None))
    along.legend(frameon=False, fontsize=7, loc="upper left")
    both = [numbers for one in everything for numbers in (one.norms, one.full)]
    known = np.concatenate([[], *both])
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


def _means(values: Sequence[np.ndarray]) -> np.ndarray:
    """The geometric mean over seeds of what is known; nan where nothing is."""
    columns = [column[np.isfinite(column)] for column in np.transpose(values)]
    return np.array([np.exp(np.log(column).mean()) if len(column) else math.nan
                     for column in columns])


def tables(figure: Figure, scale: str, results: Results) -> list[Table]:
    """For each curve the scales of its phases beside their batches, and what the fit says."""
    (panel,) = figure.panels
    cells, everything = [], []
    for curve in panel.curves:
        found = [scales(run) for run in finished(results[curve.config])]
        everything += found
        full, norms = (_means([getattr(one, name) for one in found]) for name in ("full", "norms"))
        first = found[0]
        # Stretches of one batch and one noise are a row. Where the noise falls smoothly, those of
        # one batch are, and of a batch that is always the same those of each half.
        keys = list(zip(first.batch, first.predicted, strict=True))
        if len(set(keys)) > LEVELS:
            keys = [(batch, 2 * at // STRETCHES if len(set(first.batch)) == 1 else 0)
                    for at, batch in enumerate(first.batch)]
        for key, group in itertools.groupby(range(STRETCHES), key=keys.__getitem__):
            inside = list(group)
            measured, by_norms = (_means([values[inside]]) for values in (full, norms))
            lowest, highest, by = (_of(function, values) for function, values in (
                (np.min, measured), (np.max, measured), (np.median, by_norms / measured)))
            middle = _means(measured[:, None])[0]
            cells.append([
                curve.label, f"{first.epoch[inside[0]]:.3g} to {first.epoch[inside[-1]]:.3g}",
                _between(*first.predicted[[inside[0], inside[-1]]]),
                f"{key[0]:,}", _told(middle) + f" ({_between(lowest, highest)})"
                * bool(lowest < highest), _told(key[0] / middle), _told(by)])
    fitted = fit(everything)
    note = ("Predicted noise: of that at the recipe's peak. Scales are in examples: geometric "
            "means over stretches and seeds, and in brackets the lowest and highest stretch.")
    if fitted:
        low, median, high = fitted.ratios
        note += (
            f" The scale by the norms is {low:.2g} to {high:.2g} times the full one, {median:.2g} "
            f"in the median, and within a factor of {WITHIN:g} in {fitted.agree:.0%} of "
            f"{fitted.points} stretches of runs; in {fitted.without} more, one of the two is not "
            f"known. The fit: full = {fitted.factor:.2g} x (by the norms)^{fitted.power:.2f}, off "
            f"by a factor of {fitted.spread:.2f}; the logarithms' correlation is "
            f"{fitted.correlation:.3f}.")
    return [Table(panel.name, ["curve", "epochs (middles of stretches)", "predicted noise", "batch",
                               "measured noise scale", "batch / scale", "by the norms / full"],
                  cells, note)]


def _of(function: Callable[[np.ndarray], float], values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(function(known)) if len(known) else math.nan


def _told(number: float) -> str:
    """Three digits, and a comma between thousands as everywhere in the tables."""
    if not math.isfinite(number):
        return "not known"
    return f"{float(f'{number:.3g}'):,.0f}" if abs(number) >= 100 else f"{number:.3g}"


def _between(first: float, last: float) -> str:
    return _told(first) + f" to {_told(last)}" * (_told(first) != _told(last))
