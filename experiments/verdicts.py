"""Whether the paper's values could be more of ours: a statistical test that was stated beforehand.

Whether two schedules end alike says `bigbatch.branching.verdicts`. Seeds pair the runs of two
curves, since runs of one seed begin with the same parameters and see the same examples in the same
order.
"""

import statistics
from collections.abc import Sequence

from scipy import stats

PREDICTION = 0.95


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
