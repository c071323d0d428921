"""The average over a run's examples of what its updates measure of the noise scale.

`update.noise` measures the two parts of the scale. Here they are plain numbers.
"""

import math
from typing import NamedTuple, Protocol


class Parts(Protocol):
    """The two parts of a noise scale; see `update.noise`."""

    gradient_square: float  # |G|^2
    trace: float  # tr(Sigma)


class Smoothed(NamedTuple):
    """Both parts averaged over the examples of a run, the newest most.

    One part of one update is noisy, and an average of quotients would be biased, so the parts are
    averaged first and divided afterwards. A checkpoint holds the three numbers.
    """

    gradient_square: float = 0.0
    trace: float = 0.0
    weight: float = 0.0  # of all that was averaged: from 0 towards 1, and 0.63 after one window

    def after(self, parts: Parts | None, examples: int, window: float) -> "Smoothed":
        """The averages after one more update.

        Args:
            parts: of the update; None, or parts that are not finite, add nothing.
            examples: of the update.
            window: the examples after which a value weighs 1/e of what it did.
        """
        keep = math.exp(-examples / window)
        square, trace, weight = (keep * value for value in self)
        if parts is None or not _finite(parts):
            return Smoothed(square, trace, weight)
        new = 1.0 - keep
        return Smoothed(square + new * float(parts.gradient_square),
                        trace + new * float(parts.trace), weight + new)

    @property
    def scale(self) -> float | None:
        """The noise scale in examples; see `scale_of`."""
        return scale_of(self)


def scale_of(parts: Parts) -> float | None:
    """The noise scale tr(Sigma)/|G|^2 in examples; None where a part is not over 0.

    Both are estimated without bias, so that either may fall below 0 where it is lost in its error.
    """
    square, trace = float(parts.gradient_square), float(parts.trace)
    return trace / square if _finite(parts) and min(square, trace) > 0 else None


def _finite(parts: Parts) -> bool:
    return math.isfinite(parts.gradient_square) and math.isfinite(parts.trace)
