"""The measured noise scale along runs: beside the batch, and by the norms beside all parameters."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from experiments.logs import Logs

STRETCHES = 10  # of a run, over each of which both parts are averaged
WITHIN = 2.0  # a ratio between its inverse and itself is told as agreement


class Scales(NamedTuple):
    """Noise scales over stretches of a run, in examples; nan where a part is not over 0."""

    epoch: np.ndarray  # the middle of each stretch
    full: np.ndarray  # by all parameters
    norms: np.ndarray  # by scales and biases of the norms, of the same ghost batches
    updates: np.ndarray  # the same of the updates of which a line was logged
    batch: np.ndarray  # of the schedule


def scales(run: Logs) -> Scales:
    """What a run measured. Both parts are averaged over a stretch, and divided afterwards."""
    measured = [event for event in run.events if "noise_full_trace" in event]
    end = run.phases[-1]["end_example"]

    def ratios(events: Sequence[dict], name: str) -> np.ndarray:
        found = np.full(STRETCHES, np.nan)
        for stretch in range(STRETCHES):
            parts = np.array([
                [event[f"{name}_trace"], event[f"{name}_gradient_square"]] for event in events
                if stretch < event["examples_seen"] / end * STRETCHES <= stretch + 1
                and None not in (event[f"{name}_trace"], event[f"{name}_gradient_square"])])
            if len(parts):
                trace, square = parts.mean(axis=0)
                found[stretch] = trace / square if min(trace, square) > 0 else np.nan
        return found

    middles = (np.arange(STRETCHES) + 0.5) / STRETCHES * end
    batches = [next(phase["batch_size"] for phase in run.phases if middle < phase["end_example"])
               for middle in middles]
    return Scales(
        middles / run.examples, ratios(measured, "noise_full"), ratios(measured, "noise_norms"),
        ratios([event for event in run.events if "noise_trace" in event], "noise"),
        np.array(batches))


class Fit(NamedTuple):
    """log(full) = log(factor) + power log(norms), by least squares over stretches of runs."""

    factor: float
    power: float
    spread: float  # the factor by which the full scale is usually off the fit: exp(deviation)
    correlation: float  # of the logarithms
    ratios: tuple[float, float, float]  # norms / full: the lowest, the median and the highest
    agree: float  # the share of stretches whose ratio lies between 1 / WITHIN and WITHIN
    points: int


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
        float(np.mean(np.abs(np.log(ratios)) <= math.log(WITHIN))), int(known.sum()))
