"""What a schedule is worth: how many updates it saves, and what keeps it from saving more."""

import dataclasses
import itertools
import math
from collections.abc import Sequence

from bigbatch.schedule import batches, rates, recipe
from bigbatch.schedule.batches import Strategy
from bigbatch.schedule.phases import Phase
from bigbatch.schedule.recipe import Limits, Recipe

COST_TO_NOTE = 0.01  # the share of more updates from which a plan has a note
POINTS = 20_000  # of the midpoint rule over a smooth curve


def ceiling(stated: Recipe) -> float:
    """The share of the updates that a batch can save at most, without limits and rounding.

    A batch that follows the reference's rate eta takes as many updates an epoch as eta is of its
    peak, so this is 1 - mean(eta/peak) over the examples. A warm-up, during which the batch does
    not grow, counts in full. It is the same for all exchanges.
    """
    taken = _exact(stated, Strategy("increase"), math.inf)
    return 1.0 - taken * stated.batch_size / (stated.epochs * stated.examples)


def exact_updates(
    stated: Recipe, strategy: str | Strategy, hybrid_falls: int = 1, limits: Limits | None = None
) -> float | None:
    """The updates of batches that follow the reference exactly: neither rounded nor capped.

    Args:
        stated: see `plan_phases`.
        strategy: see there.
        hybrid_falls: see there.
        limits: of these only the growths are read that "hybrid" counts under a smooth curve.

    Returns:
        Their number; None for the strategy "by_hand", whose batches follow nothing.
    """
    if isinstance(strategy, str):
        strategy = Strategy(strategy, hybrid_falls)
    stated = recipe.stated(stated, strategy.name)
    if strategy.name == "by_hand":
        return None
    most = {"increase": math.inf, "hybrid": _largest(stated, strategy, limits or Limits())}.get(
        strategy.name, 1.0)
    return _exact(stated, strategy, most)


def _largest(stated: Recipe, strategy: Strategy, limits: Limits) -> float:
    """By how much the batch of "hybrid" grows in all."""
    falls = strategy.hybrid_falls
    if stated.curve == "steps":
        return math.prod(factor for _, factor in stated.falls[:falls])
    free = dataclasses.replace(limits, max_batch_size=None)
    granularity = free.granularity or free.ghost_size
    last = [stated.batch_size, *itertools.islice(
        batches.growths(stated, free, granularity), falls)][-1]
    return last / stated.batch_size


def _exact(stated: Recipe, strategy: Strategy, most: float) -> float:
    """The updates of a batch of B_ref x min(peak/eta, most) after the warm-up, with the ramp."""
    n, last = stated.examples, stated.epochs * stated.examples
    if stated.curve == "steps":
        cuts = [epoch * n for epoch, _ in stated.falls]
    else:
        first = rates.warmup_end(stated)
        cuts = [first + (last - first) * index / POINTS for index in range(POINTS)]
    peak = rates.peak_example(stated)
    cuts = sorted({0.0, *cuts, *(epoch * n for epoch, _ in strategy.ramp), last})
    updates = 0.0
    for start, end in itertools.pairwise(cuts):
        middle = (start + end) / 2
        share = rates.share(stated, round(middle)) if middle > peak else 1.0
        ramp = math.prod(factor for epoch, factor in strategy.ramp if epoch * n > middle)
        updates += (end - start) / stated.batch_size * max(share, 1 / most) * ramp
    return updates


def notes(
    stated: Recipe, phases: Sequence[Phase], strategy: str | Strategy, hybrid_falls: int = 1,
    limits: Limits | None = None,
) -> list[str]:
    """Warnings for the plan.

    They say what rounding and limits cost, whether the rate alone ends the fall, and which phases
    have an approximate noise scale far from the exact one.

    Args:
        stated: of the plan.
        phases: of the plan.
        strategy: of the plan.
        hybrid_falls: only read by the name "hybrid".
        limits: of the plan.
    """
    made = sum(phase.updates for phase in phases)
    exact = exact_updates(stated, strategy, hybrid_falls, limits)
    found = []
    # Each phase ends on a whole update.
    if exact is not None and made - exact > COST_TO_NOTE * exact + len(phases):
        growth = "" if stated.curve == "steps" else " and grow by limits.growth at once"
        found.append(
            f"batches that followed the noise exactly would take {exact:.0f} updates. That batches "
            "are rounded down to multiples of limits.granularity (ghost_size if unset) and kept to "
            f"limits.max_batch_size{growth} costs {made - exact:.0f} more; the rate makes up the "
            "noise."
        )
    last = phases[-1]
    name = strategy if isinstance(strategy, str) else strategy.name
    if stated.curve != "steps" and name in ("increase", "hybrid") and last.updates:
        first, end = (rates.reference_rate(stated, example) for example in (
            last.start_example, last.end_example - last.batch_size))
        if end < 0.5 * first:
            found.append(
                f"from epoch {last.start_example / stated.examples:.2f} on, where the batch is at "
                f"its largest, the rate alone falls: to {end / first:.2g} of what it is there."
            )
    return found + [
        f"{phase.name}: batch {phase.batch_size} is over a tenth of the {stated.examples} training "
        f"examples; the exact noise scale is {phase.batch_size / stated.examples:.1%} below the "
        "approximate one that the schedules share."
        for phase in phases
        if stated.exchange == "linear" and phase.batch_size > stated.examples / 10
    ]
