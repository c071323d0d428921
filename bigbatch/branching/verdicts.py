"""Whether values end alike, and up to which factor of the batch: tests that were stated beforehand.

All compare pairs: what two runs give that begin with the same parameters and see the same examples
in the same order differs by less than what two runs give that share nothing.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from bigbatch.mistake import Mistake

# Two one-sided tests at 5 % each (Schuirmann, 1987): the 90 % interval lies within the margin.
CONFIDENCE = 0.90
# What an interval covers, by what the pairs are.
PAIRED_OVER = {
    "runs": "runs, whose seeds differ, so the interval covers what another seed would give",
    "orders": "orders of the examples to come, from one checkpoint, so the interval covers what "
              "another order would give from there, and no other seed",
    "evaluations": "evaluations of one run, so the interval covers the noise within this run, and "
                   "neither another seed nor another order: give several workdirs, or --orders",
}


class Comparison(NamedTuple):
    """A comparison of values with a reference's, paired."""

    difference: float  # mean over the pairs, the values minus the reference's
    low: float  # the confidence interval of that mean
    high: float
    verdict: str  # same, lower, higher or undecided


def compare(
    values: Sequence[float], reference: Sequence[float], margin: float
) -> Comparison | None:
    """Compares values with a reference's, one of each a pair; None where there is one pair only.

    "same": the confidence interval of the mean difference lies within plus and minus `margin`.
    "lower" and "higher": it does not, and holds no 0. "undecided": neither; more pairs are needed.

    Raises:
        Mistake: if there are not as many of both.
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


class Factor(NamedTuple):
    """How the branches of one factor compare with those of the factor 1."""

    factor: int
    pairs: int
    comparison: Comparison | None  # None of the factor 1, and where a branch diverged
    passes: bool | None  # whether the loss is higher by the margin at most; None: undecided


def of_factors(losses: Mapping[int, np.ndarray], margin: float) -> tuple[str, list[Factor]]:
    """Compares the branches of each factor with those of the factor 1.

    Several runs are several pairs. Of one run, its orders are, and of one order the evaluations:
    see `PAIRED_OVER` for what an interval then covers.

    Args:
        losses: {factor: losses_RxOxE}, of each run, order of examples and evaluation; nan where a
            branch diverged.
        margin: by how much a loss may be higher.

    Returns:
        A key of `PAIRED_OVER`, and the comparisons in the order of the factors.
    """
    runs, orders, _ = losses[1].shape
    over = "runs" if runs > 1 else "orders" if orders > 1 else "evaluations"

    def pairs(losses_RxOxE: np.ndarray) -> np.ndarray:
        axes = {"runs": (1, 2), "orders": (0, 2), "evaluations": (0, 1)}[over]
        return losses_RxOxE.mean(axis=axes)

    found = []
    for factor in sorted(losses):
        values, reference = pairs(losses[factor]).tolist(), pairs(losses[1]).tolist()
        comparison, passes = None, None
        if factor == 1:
            passes = True
        elif not np.isfinite(values).all():
            passes = False
        elif comparison := compare(values, reference, margin):
            passes = (True if comparison.high <= margin else
                      False if comparison.low > margin else None)
        found.append(Factor(factor, len(values), comparison, passes))
    return over, found


def critical(factors: Sequence[Factor]) -> tuple[int, int | None]:
    """Between which two factors the critical batch lies.

    Returns:
        The largest factor that passes as all smaller ones do, and the smallest that fails (None:
        none does).
    """
    passing = 1
    for one in factors:
        if not one.passes:
            break
        passing = one.factor
    return passing, next((one.factor for one in factors if one.passes is False), None)


def told(factors: Sequence[Factor], batch_size: int) -> str:
    """The verdict in a sentence."""
    passing, failing = critical(factors)
    text = (f"The loss is as good up to a batch of {passing * batch_size}, {passing} times the "
            "run's")
    undecided = [one.factor for one in factors if one.passes is None]
    if failing is not None:
        text += f", and worse at {failing * batch_size} ({failing} times)"
    elif not undecided:
        text += ", the largest that was tried"
    if undecided:
        text += f"; undecided: {', '.join(f'{factor} times' for factor in undecided)}"
    return text + "."
