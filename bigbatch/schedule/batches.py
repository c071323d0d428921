"""The batch's path: at which examples a strategy changes the batch, and to what.

Pure Python; of the package only `mistake` is imported.
"""

import bisect
import itertools
import math
import operator
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from bigbatch.mistake import Mistake
from bigbatch.schedule import curves, rates, recipe
from bigbatch.schedule.recipe import Limits, Recipe

JUST_OVER_1 = 1 + 1e-12  # keeps rounding errors from turning a multiple into one multiple less


# What a run has decided on its way: (example, batch from there on), in order. Only the strategy
# "measured" decides.
Decisions = tuple[tuple[int, int], ...]


class Strategy(NamedTuple):
    """How a batch's path is chosen."""

    name: str  # one of STRATEGIES
    hybrid_falls: int = 1  # of "hybrid": how many falls, or growths under a smooth curve
    by_hand: tuple[tuple[float, int], ...] = ()  # of "by_hand": (epoch, batch from there on)
    # (epoch, factor): the batch begins below the recipe's and is multiplied there, early in a run.
    ramp: tuple[tuple[float, float], ...] = ()
    decisions: Decisions = ()  # of "measured"


class Mark(NamedTuple):
    """An example from which a stretch of the run has another batch, rate or name."""

    example: int
    epoch: float
    name: str
    batch: int  # from here on
    # Whether it may be passed over where the update before it reaches the mark after it.
    passable: bool = False


def marks(
    stated: Recipe, strategy: Strategy, limits: Limits, granularity: int
) -> list[Mark]:
    """Where stretches of the run begin, in order; the first begins at 0."""
    names = _names(stated)
    first = Mark(0, 0.0, names[0], stated.batch_size)
    if stated.warmup_epochs:
        marks = [first._replace(name="warmup"),
                 first._replace(example=rates.warmup_end(stated), epoch=stated.warmup_epochs)]
    else:
        marks = [first]
    if stated.curve == "steps":
        marks += _at_falls(stated, strategy, limits, granularity, names)
    else:
        marks += _at_growths(stated, strategy, limits, granularity)
    if strategy.name == "by_hand":
        marks = _by_hand(stated, strategy.by_hand, limits, granularity, marks)
    if strategy.name == "measured":
        if strategy.ramp:
            raise Mistake("the strategy measured takes no ramp: when its batch grows it decides.")
        if strategy.decisions:
            at_epochs = [(example / stated.examples, batch)
                         for example, batch in strategy.decisions]
            marks = _by_hand(stated, at_epochs, limits, granularity, marks)
    return _with_ramp(stated, strategy, granularity, marks) if strategy.ramp else marks


def _at_falls(
    stated: Recipe, strategy: Strategy, limits: Limits, granularity: int, names: Sequence[str]
) -> list[Mark]:
    """One mark a fall; the batch's share of the falls so far is rounded down and capped."""
    falls = stated.falls
    if strategy.name == "hybrid" and not 0 <= strategy.hybrid_falls <= len(falls):
        raise Mistake(
            f"hybrid_falls is {strategy.hybrid_falls}; the recipe has {len(falls)} falls, so it "
            f"must lie between 0 and {len(falls)}."
        )
    by_batch = {"hybrid": strategy.hybrid_falls, "increase": len(falls)}.get(strategy.name, 0)
    marks, batch, growth = [], stated.batch_size, 1.0
    for index, (epoch, factor) in enumerate(falls):
        if index < by_batch:
            # From the first batch and the whole growth: what rounding takes from one fall the next
            # falls make up for.
            growth *= factor
            grown = int(stated.batch_size * growth * JUST_OVER_1 // granularity) * granularity
            if limits.max_batch_size is not None:
                grown = min(grown, limits.max_batch_size)
            _check_growth(stated, limits, granularity, batch, grown)
            if grown >= batch * (limits.growth or 1.0):
                batch = grown
        marks.append(Mark(round(epoch * stated.examples), epoch, names[index + 1], batch))
    return marks


def growths(stated: Recipe, limits: Limits, granularity: int) -> Iterator[int]:
    """The batches after the first that a growing batch takes under a smooth curve, without end.

    Each is at least `limits.growth` times the one before. A multiple of the first batch is
    preferred, since it is made of the first batch's passes and needs no further program.

    Args:
        stated: the recipe.
        limits: `max_batch_size` ends them.
        granularity: of all batches.
    """
    growth, first = limits.growth or recipe.GROWTH, stated.batch_size
    batch = first
    while True:
        least = batch * growth / JUST_OVER_1
        whole = -int(-least // first) * first
        batch = whole if whole < least * growth else -int(-least // granularity) * granularity
        if batch > (limits.max_batch_size or recipe.MOST_EXAMPLES):
            return
        yield batch


def _at_growths(
    stated: Recipe, strategy: Strategy, limits: Limits, granularity: int
) -> list[Mark]:
    """One mark where the tail of wsd begins, and one for each growth of the batch."""
    n, first = stated.examples, stated.batch_size
    last, peak = round(stated.epochs * n), rates.warmup_end(stated)
    rates.share(stated, 0)  # refuses what is no curve
    marks = []
    if stated.curve == "wsd" and stated.tail_share < 1:
        tail = peak + round((last - peak) * (1 - stated.tail_share))
        marks.append(Mark(tail, tail / n, "tail", first, passable=True))
    if strategy.name not in ("hybrid", "increase"):
        return marks
    _check_falling(stated)
    peak = rates.peak_example(stated)
    most = strategy.hybrid_falls if strategy.name == "hybrid" else None
    if most is not None and most < 0:
        raise Mistake(f"hybrid_falls is {most}; it must be 0 or more growths of the batch.")
    before = first
    for batch in itertools.islice(growths(stated, limits, granularity), most):
        # The first example at which the first batch over the share that is left comes to `batch`.
        start = peak + bisect.bisect_left(
            range(peak, last), True,
            key=lambda example: rates.share(stated, example) * batch <= first * JUST_OVER_1)
        if start >= last:
            break
        _check_growth(stated, limits, granularity, before, batch)
        name = _level_name(stated, batch / first)
        marks.append(Mark(start, start / n, name, batch, passable=True))
        before = batch
    return marks


def _by_hand(
    stated: Recipe, by_hand: Sequence[tuple[float, int]], limits: Limits, granularity: int,
    marks: Sequence[Mark],
) -> list[Mark]:
    """`marks` with the batches that are given by hand, and with one more where a batch begins."""
    at_hand, before = [], 0.0
    pairs = recipe.pairs("by_hand", by_hand)
    if not pairs:
        raise Mistake("by_hand is (); the strategy by_hand needs ((epoch, batch), ...).")
    for epoch, batch in pairs:
        most = stated.examples if limits.max_batch_size is None else limits.max_batch_size
        whole = math.isfinite(batch) and batch == int(batch) and batch % granularity == 0
        if not (whole and 1 <= batch <= most):
            raise Mistake(
                f"by_hand has a batch of {batch:g} at epoch {epoch:g}; it must be a multiple of "
                f"{granularity} (limits.granularity, or the ghost batch) and at most {most} "
                "(limits.max_batch_size, or the training set)."
            )
        if not before < epoch < stated.epochs:
            raise Mistake(
                f"the epochs of by_hand are {[at for at, _ in pairs]} of {stated.epochs:g}; each "
                f"must come after the one before it, over 0 and below the end, which {epoch:g} "
                "does not."
            )
        before = epoch
        at_hand.append(Mark(
            round(epoch * stated.examples), epoch, f"epoch/{epoch:g}", int(batch)))
    starts = {mark.example for mark in marks}
    both = sorted(
        [*marks, *(mark for mark in at_hand if mark.example not in starts)],
        key=operator.attrgetter("example"))
    found = []
    for mark in both:
        batch = next((hand.batch for hand in reversed(at_hand) if hand.example <= mark.example),
                     stated.batch_size)
        # A fall inside of the update before a batch's own mark is of no phase: the rate falls where
        # the batch changes.
        found.append(mark._replace(
            batch=batch, passable=all(hand.example != mark.example for hand in at_hand)))
    return found


def _with_ramp(
    stated: Recipe, strategy: Strategy, granularity: int, marks: list[Mark]
) -> list[Mark]:
    """`marks` with the batches divided while the ramp is under way, and one more at its steps.

    Raises:
        Mistake: if the ramp is none, or divides a batch to what is no multiple of the granularity.
    """
    ramp = strategy.ramp
    recipe.check_marks("ramp", ramp, stated.epochs)
    starts = [mark.example for mark in marks]
    for epoch, _ in ramp:
        example = round(epoch * stated.examples)
        if example not in starts:
            under = marks[bisect.bisect_right(starts, example) - 1]
            marks = [*marks, under._replace(
                example=example, epoch=epoch, passable=strategy.name == "by_hand")]
    ramped = []
    for mark in sorted(marks, key=operator.attrgetter("example")):
        left = math.prod(
            factor for epoch, factor in ramp if round(epoch * stated.examples) > mark.example)
        if left == 1:
            ramped.append(mark)
            continue
        batch = round(mark.batch / left / granularity) * granularity
        if batch < 1 or abs(batch * left - mark.batch) > 1e-6 * mark.batch:
            raise Mistake(
                f"the ramp divides the batch of {mark.batch} by {left:g} from epoch "
                f"{mark.epoch:g} on, to {mark.batch / left:g}, which is no multiple of "
                f"{granularity} (limits.granularity, or the ghost batch); change the ramp's "
                "factors or the recipe's batch."
            )
        ramped.append(mark._replace(name=f"{mark.name}+ramp/{left:g}", batch=batch))
    return ramped


def _names(stated: Recipe) -> list[str]:
    """A name for each level of the noise: by how much it is divided, in as few digits as differ."""
    falls = stated.falls if stated.curve == "steps" else ()
    divided = list(itertools.accumulate((factor for _, factor in falls), operator.mul, initial=1.0))
    for digits in (6, 9, 12, 17):
        names = [_level_name(stated, value, digits) for value in divided]
        if len(set(names)) == len(names):
            break
    return names


def _level_name(stated: Recipe, divided: float, digits: int = 6) -> str:
    """The name of a phase in which the rate of the reference has been divided by `divided`."""
    power = recipe.exchange_power(stated.exchange)
    if not power:
        return f"rate/{divided:.{digits}g}"
    return f"noise/{divided ** (1.0 / power):.{digits}g}"


def _check_growth(
    stated: Recipe, limits: Limits, granularity: int, batch: int, grown: int
) -> None:
    """Raises Mistake if no limit is set and a batch would grow past the training set."""
    if limits.max_batch_size is None and grown > stated.examples:
        limit = max(stated.examples // 10 // granularity * granularity, stated.batch_size)
        raise Mistake(
            f"the batch would grow from {batch} to {grown}, past the {stated.examples} training "
            f"examples; set limits.max_batch_size, for example to {limit} (the noise scales agree "
            "while the batch is below about a tenth of the training set)."
        )


def _check_falling(stated: Recipe) -> None:
    """Raises Mistake for a curve that a growing batch cannot follow."""
    if rise := curves.rise_after_peak(rates.shape_of(stated)):
        raise Mistake(
            f"the curve {curves.name_of(stated.curve)!r} rises again by {rise[1]:.3g} of its peak "
            f"after {rise[0]:.3g} of its progress; a batch that grows while the rate falls cannot "
            "follow it. Take the strategy decay or by_hand, or a curve that only falls after its "
            "peak."
        )
