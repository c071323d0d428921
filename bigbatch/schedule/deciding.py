"""Growth that a run decides on its way: rules that say how large a batch the gradients bear.

A rule reads numbers that the updates so far have measured, which are the same on any hardware, and
names a batch. At fixed intervals of examples the run takes the next rung of its ladder
(`batches.growths`) if the rule's batch reaches it: one rung at a time, never back, and only after a
stay on the rung before. The rungs are known in advance, and so is each program; only their places
are not. The decisions are part of a checkpoint, and the phases follow from the config and from them
alone. Pure Python.

With G the mean gradient, Sigma the covariance of an example's, and B_simple = tr(Sigma)/|G|^2 the
noise scale (McCandlish et al., "An Empirical Model of Large-Batch Training", 2018), four of the
rules are thresholds of one statistic.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from bigbatch.mistake import Mistake
from bigbatch.schedule import batches, due, rates, recipe
from bigbatch.schedule.batches import Decisions
from bigbatch.schedule.recipe import Limits, Recipe
from bigbatch.schedule.smoothing import Parts, Smoothed


class Seen(NamedTuple):
    """What a rule reads: averages over the newest examples, and where the run stands."""

    gradient_square: float  # |G|^2; an estimate without bias, which may be below 0
    trace: float  # tr(Sigma) of an example
    loss: float  # of training
    batch_size: int
    first_batch: int  # the recipe's, B_ref
    reference_rate: float  # eta(e), of a batch of B_ref


class Rule(NamedTuple):
    """Which rule decides, and when."""

    name: str = "noise"  # of RULES, or "loss"
    threshold: float | None = None  # see RULES; None: its default
    losses: tuple[tuple[float, float], ...] = ()  # of "loss": (loss, batch that it allows)
    every: int = 1  # examples between two decisions
    stay: int = 0  # examples for which a batch stays at least
    trusted: float = 0.5  # the weight of an average, from 0 to 1, from which it is believed


class Growth(NamedTuple):
    """What a run has seen and decided so far. A checkpoint holds it; empty where nothing decides.

    The noise scale by the norms is not in it, since every run has that.
    """

    decisions: Decisions = ()
    loss: float = 0.0  # of training, summed with weights that fall over a window of examples
    loss_weight: float = 0.0  # the sum of these weights, from 0 towards 1
    by_all: Smoothed = Smoothed()  # the noise scale by all parameters

    def after_update(self, loss: float, examples: int, window: float) -> "Growth":
        """After one more update, of so many examples."""
        keep = math.exp(-examples / window)
        return self._replace(loss=keep * self.loss + (1 - keep) * loss,
                             loss_weight=keep * self.loss_weight + 1 - keep)

    def after_measurement(self, parts: Parts | None, examples: int, window: float) -> "Growth":
        """After one more measurement by all parameters, so many examples after the one before."""
        return self._replace(by_all=self.by_all.after(parts, examples, window))


class Steering(NamedTuple):
    """All that decides, beside what is measured. It follows from the config."""

    rule: Rule
    rungs: tuple[int, ...]  # see `ladder`
    stated: Recipe
    by_all: bool  # whether the rule reads the noise scale by all parameters, or by the norms
    window: int  # examples over which averages run
    measured_every: int  # examples between two measurements by all parameters

    def is_due(self, start: int, end: int) -> bool:
        """Whether the update between two positions is followed by a decision."""
        return end // self.rule.every > start // self.rule.every

    def look(self, growth: Growth, noise: Smoothed, example: int) -> tuple[Growth, float | None]:
        """Decides after the update that ends at `example`.

        Args:
            growth: so far.
            noise: by the norms.
            example: the examples seen.

        Returns:
            The growth with this decision, and the batch that the rule names (None: none).
        """
        parts = growth.by_all if self.by_all else noise
        weight = growth.loss_weight if self.rule.name == "loss" else parts.weight
        asked_for = None
        if weight >= self.rule.trusted:
            batch = growth.decisions[-1][1] if growth.decisions else self.rungs[0]
            asked_for = wanted(self.rule, Seen(
                parts.gradient_square / weight, parts.trace / weight,
                growth.loss / growth.loss_weight, batch, self.rungs[0],
                rates.reference_rate(self.stated, example)))
        decided = decide(self.rule, self.rungs, growth.decisions, example, asked_for)
        return growth._replace(decisions=decided), asked_for


def noise(seen: Seen, factor: float) -> float | None:
    """B = factor x B_simple: the batch whose updates' noise is 1/factor of the gradient itself."""
    return factor * seen.trace / seen.gradient_square if seen.gradient_square > 0 else None


def norm_test(seen: Seen, theta: float) -> float | None:
    """The norm test: grow while the variance of the batch's gradient is over theta^2 of its square.

    Byrd, Chin, Nocedal and Wu, "Sample Size Selection in Optimization Methods for Machine
    Learning", 2012, and Bollapragada, Byrd and Nocedal, "Adaptive Sampling Strategies for
    Stochastic Optimization", 2018: B = tr(Sigma)/(theta^2 |g|^2). The square of the batch's own
    gradient g is that of G and the variance that remains, |G|^2 + tr(Sigma)/B. So from 1 on theta
    never asks for more than there is.
    """
    square = seen.gradient_square + seen.trace / seen.batch_size
    return seen.trace / (theta**2 * square) if square > 0 else None


def adascale(seen: Seen, share: float) -> float | None:
    """The largest batch whose updates gain `share` of what as many examples in small ones would.

    Johnson, Agrawal, Gu and Guestrin, "AdaScale SGD", 2020: S times the batch gains
    r = (v + G2)/(v/S + G2) in the place of S, with the variance v = tr(Sigma)/B_ref of the first
    batch's gradient and G2 = |G|^2. r/S >= share where S <= ((v + G2)/share - v)/G2.
    """
    if seen.gradient_square <= 0:
        return None
    variance = seen.trace / seen.first_batch
    most = ((variance + seen.gradient_square) / share - variance) / seen.gradient_square
    return seen.first_batch * most


def cabs(seen: Seen, factor: float) -> float | None:
    """Balles, Romero and Hennig, "Coupling Adaptive Batch Sizes with Learning Rates", 2017.

    B = rate x tr(Sigma)/loss, for a loss whose least value is 0, with the reference's rate.
    """
    return factor * seen.reference_rate * seen.trace / seen.loss if seen.loss > 0 else None


# Each with its function from what was seen and a threshold to a batch, and the default threshold.
RULES: Mapping[str, tuple[Callable[[Seen, float], float | None], float]] = {
    "noise": (noise, 1.0), "norm_test": (norm_test, 0.5), "adascale": (adascale, 0.5),
    "cabs": (cabs, 1.0),
}
NAMES = (*RULES, "loss")
ALMOST_0 = 1e-10


def wanted(rule: Rule, seen: Seen) -> float | None:
    """The batch that a rule names; None where what was seen does not allow to say."""
    if rule.name == "loss":
        return max((batch for loss, batch in rule.losses if seen.loss <= loss), default=None)
    function, default = RULES[rule.name]
    return function(seen, default if rule.threshold is None else rule.threshold)


def ladder(stated: Recipe, limits: Limits) -> tuple[int, ...]:
    """The batches that a run may come to, from the recipe's on.

    Raises:
        Mistake: if no limit ends them.
    """
    granularity = recipe.check(stated, "measured", limits)
    if limits.max_batch_size is None:
        raise Mistake(
            "the strategy measured has no largest batch: set limits.max_batch_size, for which the "
            "programs can then be compiled and the memory be known."
        )
    return stated.batch_size, *batches.growths(stated, limits, granularity)


def decide(
    rule: Rule, rungs: Sequence[int], decisions: Decisions, example: int, asked_for: float | None
) -> Decisions:
    """The decisions after one more look; the same ones where nothing is decided.

    Args:
        rule: of the run.
        rungs: see `ladder`.
        decisions: so far.
        example: the examples seen, at the end of an update.
        asked_for: the batch that the rule names; None for none.
    """
    since, batch = decisions[-1] if decisions else (0, rungs[0])
    above = [rung for rung in rungs if rung > batch]
    if not above or asked_for is None or asked_for < above[0] or example - since < rule.stay:
        return decisions
    return *decisions, (example, above[0])


def soonest(stated: Recipe, rule: Rule, rungs: Sequence[int]) -> Decisions:
    """The decisions of a run whose rule always asks for more: no run takes fewer updates."""
    last = round(stated.epochs * stated.examples)
    is_due = due.make_due({"decision": rule.every}, 1, last)
    decisions: Decisions = ()
    example, batch = 0, rungs[0]
    while len(decisions) < len(rungs) - 1:
        end = example + batch * -(-(rule.every - example % rule.every) // batch)
        if end >= last:
            break
        assert is_due("decision", end - batch, end)
        decisions = decide(rule, rungs, decisions, end, math.inf)
        example, batch = end, decisions[-1][1] if decisions else batch
    return decisions


def check(rule: Rule) -> None:
    """Checks a rule.

    Raises:
        Mistake: if there is no such rule, or a value of it is not allowed.
    """
    if rule.name not in NAMES:
        raise Mistake(f"measured.rule is {rule.name!r}; allowed are {', '.join(NAMES)}.")
    if rule.threshold is not None and not 0 < rule.threshold < math.inf:
        raise Mistake(f"measured.threshold is {rule.threshold}; it must be a finite number over 0.")
    if rule.name == "loss" and not rule.losses:
        raise Mistake("measured.losses is (); the rule loss needs ((loss, batch), ...).")
    for loss, batch in rule.losses:
        if not (math.isfinite(loss) and 1 <= batch < math.inf):
            raise Mistake(
                f"measured.losses has ({loss:g}, {batch:g}); a loss must be a finite number, and "
                "the batch that it allows 1 or more.")
    falling = [loss for loss, _ in rule.losses]
    if any(one <= two for one, two in itertools.pairwise(falling)):
        raise Mistake(f"measured.losses are at {falling}; each must be below the one before it.")


def check_reach(rule: Rule, rungs: Sequence[int]) -> None:
    """Checks that a batch can grow at all: that the rule can name the first rung above it.

    Args:
        rule: of the run.
        rungs: see `ladder`.

    Raises:
        Mistake: if it cannot, or if there is no such rung.
    """
    first, *above = rungs
    if not above:
        raise Mistake(
            f"the strategy measured has no batch to grow to: {first} is the first, and the next "
            "would be over limits.max_batch_size; raise it, or lower limits.growth.")
    # Each rule names the more, the less is seen of the gradient beside its noise, and the lower the
    # loss is.
    lowest = -math.inf if rule.name == "loss" else ALMOST_0
    most = wanted(rule, Seen(ALMOST_0, 1.0, lowest, first, first, 1.0)) or 0
    if most < above[0]:
        value = f"measured.losses is {rule.losses}"
        if rule.name != "loss":
            value = f"measured.threshold is {rule.threshold or RULES[rule.name][1]:g}"
        remedy = {"loss": "name larger batches", "norm_test": "lower the threshold",
                  "adascale": "lower the threshold"}.get(rule.name, "raise the threshold")
        raise Mistake(
            f"{value}, with which the rule {rule.name} never asks for a batch over {most:.6g} in "
            f"updates of {first}. The next batch is {above[0]}, so none would ever grow: {remedy}, "
            "or lower limits.growth.")
