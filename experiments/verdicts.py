"""Whether two schedules end alike, and whether the paper's values could be more of ours.

Both are statistical tests that were stated beforehand. Seeds pair the runs of two curves, since
runs of one seed begin with the same parameters and see the same examples in the same order.
"""

import statistics
from collections.abc import Sequence
from typing import NamedTuple

from scipy import stats

from bigbatch.mistake import Mistake

# Two one-sided tests at 5 % each (Schuirmann, 1987): the 90 % interval lies within the margin.
CONFIDENCE = 0.90
PREDICTION = 0.95


class Comparison(NamedTuple):
    """A comparison of a curve's final values with a reference's, paired over seeds."""

    difference: float  # mean over seeds, ours minus the reference
    low: float  # the confidence interval of that mean
    high: float
    verdict: str  # same, lower, higher or undecided


def compare(
    values: Sequence[float], reference: Sequence[float], margin: float
) -> Comparison | None:
    """Compares final values, one a seed in the seeds' order; None where there is one seed only.

    "same": the confidence interval of the mean difference lies within plus and minus `margin`.
    "lower" and "higher": it does not, and holds no 0. "undecided": neither; more seeds are needed.

    Raises:
        Mistake: if the two are not of the same seeds.
    """
    if len(values) != len(reference):
        raise Mistake(f"{len(values)} runs cannot be paired with {len(reference)}.")
    if len(values) < 2:
        return None
    low, high = map(float, stats.ttest_rel(values, reference).confidence_interval(CONFIDENCE))
    if -margin <= low and high <= margin:
        verdict = "same"
    elif high < 0:
        verdict = "lower"
    elif low > 0:
        verdict = "higher"
    else:
        verdict = "undecided"
    return Comparison(
        statistics.mean(values) - statistics.mean(reference), low, high, verdict)


def inside(values: Sequence[float], papers: Sequence[float]) -> bool | None:
    """Whether the paper's values could be further runs of ours; None where either is too few.

    Each of the paper's values must lie in the interval in which 95 % of single further runs would,
    were ours drawn from a normal distribution: mean ± t s √(1 + 1/n).
    """
    if len(values) < 2 or not papers:
        return None
    n = len(values)
    half = stats.t.ppf((1 + PREDICTION) / 2, n - 1) * statistics.stdev(values) * (1 + 1 / n) ** 0.5
    return all(bool(abs(paper - statistics.mean(values)) <= half) for paper in papers)
