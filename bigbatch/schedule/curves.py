"""The shapes in which a learning rate falls: the share of its peak that is left at each progress.

Progress runs from 0, where a warm-up ends, to 1, the end of the run.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

from bigbatch.mistake import Mistake

Shape = Callable[[float], float]  # progress in [0, 1] -> share of the peak in [0, 1]
# How far up from its `final` share a tail is, by how much of the tail is over.
TAILS: Mapping[str, Shape] = {
    "linear": lambda over: 1.0 - over,
    "1-sqrt": lambda over: 1.0 - math.sqrt(over),
    "cosine": lambda over: (1.0 + math.cos(math.pi * over)) / 2.0,
}
NEED_FINAL_SHARE = ("exponential", "inverse_sqrt")
CURVES = ("steps", "cosine", "linear", "polynomial", "exponential", "inverse_sqrt", "wsd")
SMALLEST_SHARE = 1e-9  # of NEED_FINAL_SHARE
SAMPLES = 4096  # at which a function of the user's is tried
ROUNDING = 1e-6  # of a function that computes in float32


@functools.lru_cache(maxsize=64)  # every update asks; a function of the user's is tried once
def make_shape(
    curve: str | Shape, final_share: float = 0.0, power: float = 1.0, tail_share: float = 0.2,
    tail_shape: str = "linear",
) -> Shape:
    """The function of a smooth curve, from progress to the share of the peak.

    Args:
        curve: one of CURVES but "steps", which has falls in the place of a function:
            "cosine", half a period (Loshchilov & Hutter, 2017); "linear"; "polynomial", of `power`;
            "exponential", by the same factor in equal times; "inverse_sqrt", 1/sqrt(1 + c progress)
            with the c that ends at `final_share`; "wsd", the peak until a tail begins
            (warm-up-stable-decay, Hu et al., 2024). Or a function of progress, which is returned.
        final_share: the share at the end.
        power: of "polynomial".
        tail_share: how much of the progress is the tail of "wsd".
        tail_shape: the shape of this tail, one of TAILS.

    Raises:
        Mistake: if a value is out of its range, or the user's function is no curve.
    """
    if callable(curve):
        shape = functools.partial(_share, curve)
        _check_function(shape, name_of(curve))
        return shape
    if curve not in CURVES:
        raise Mistake(
            f"recipe.curve is {curve!r}; allowed are {', '.join(CURVES)}, or the dotted path of a "
            "function from progress (0 to 1) to the share of recipe.learning_rate that is left."
        )
    _check_shape(curve, final_share, power, tail_share, tail_shape)
    height = 1.0 - final_share
    if curve == "exponential":
        return lambda progress: final_share**progress
    if curve == "inverse_sqrt":
        return lambda progress: 1.0 / math.sqrt(1.0 + progress * (final_share**-2 - 1.0))
    if curve == "polynomial":
        return lambda progress: final_share + height * (1.0 - progress) ** power
    if curve == "wsd":
        tail = TAILS[tail_shape]
        return lambda progress: final_share + height * (
            1.0 if progress <= 1.0 - tail_share
            else tail((progress - (1.0 - tail_share)) / tail_share))
    return lambda progress: final_share + height * TAILS[curve](progress)


def _check_shape(
    curve: str, final_share: Any, power: Any, tail_share: Any, tail_shape: str
) -> None:
    """Raises Mistake for a value that the curve cannot have."""
    needs = curve in NEED_FINAL_SHARE
    lowest = f"{SMALLEST_SHARE:g} or more and below 1" if needs else "0 or more and below 1"
    if not (SMALLEST_SHARE if needs else 0) <= final_share < 1:
        raise Mistake(
            f"recipe.final_share is {final_share:g}; with the curve {curve!r} the share of the peak"
            f" that is left at the end must be {lowest}, for example 0.01."
        )
    if curve == "polynomial" and not (math.isfinite(power) and power > 0):
        raise Mistake(f"recipe.power is {power:g}; a polynomial curve needs a finite power over 0.")
    if curve == "wsd" and not 0 < tail_share <= 1:
        raise Mistake(
            f"recipe.tail_share is {tail_share:g}; the tail of wsd, in which the rate falls, must "
            "be over 0 and at most 1 of what follows the warm-up, for example 0.2."
        )
    if curve == "wsd" and tail_shape not in TAILS:
        raise Mistake(
            f"recipe.tail_shape is {tail_shape!r}; allowed are {', '.join(TAILS)}.")


def name_of(curve: str | Shape) -> str:
    """The name of a curve; of a function of the user's, its own."""
    return curve if isinstance(curve, str) else getattr(curve, "__name__", repr(curve))


def _share(function: Shape, progress: float) -> float:
    """What a function of the user's returns, as a number of Python."""
    share = function(progress)
    if isinstance(share, str | bytes) or not hasattr(share, "__float__"):
        raise Mistake(_no_share(function, progress, share))
    try:
        return float(share)
    except (TypeError, ValueError):  # an array of several numbers
        raise Mistake(_no_share(function, progress, share)) from None


def _no_share(function: str | Shape, progress: float, share: Any) -> str:
    return (f"recipe.curve: {name_of(function)}({progress:g}) is {share!r}; a curve returns "
            "numbers from 0 to 1, the share of recipe.learning_rate that is left.")


def _check_function(shape: Shape, name: str) -> None:
    """Raises Mistake for a function that does not return shares of a peak."""
    highest = 0.0
    for index in range(SAMPLES + 1):
        share = shape(index / SAMPLES)
        if not -ROUNDING <= share <= 1 + ROUNDING:
            raise Mistake(_no_share(name, index / SAMPLES, share))
        highest = max(highest, share)
    if highest < 1 - ROUNDING * SAMPLES:  # between the samples it may be higher
        raise Mistake(
            f"recipe.curve: the highest value of {name} is {highest:g}; it must be 1, so that "
            "recipe.learning_rate is the peak: divide the function by its highest value."
        )


@functools.lru_cache(maxsize=64)
def rise_after_peak(shape: Shape) -> tuple[float, float] | None:
    """The progress from which a shape rises most after its peak, and by how much.

    None if it never rises after its peak; a rise within the rounding of float32 is none.
    """
    shares = [shape(index / SAMPLES) for index in range(SAMPLES + 1)]
    first = max(range(SAMPLES + 1), key=shares.__getitem__)
    lowest, most, start = first, ROUNDING, None
    for index in range(first, SAMPLES + 1):
        if shares[index] < shares[lowest]:
            lowest = index
        elif shares[index] - shares[lowest] > most:
            most, start = shares[index] - shares[lowest], lowest
    return None if start is None else (start / SAMPLES, most)


@functools.lru_cache(maxsize=64)
def peak(shape: Shape) -> float:
    """The progress of a shape's peak; a function of the user's may rise to it."""
    return max(range(SAMPLES + 1), key=lambda index: shape(index / SAMPLES)) / SAMPLES
