"""Turns a recipe and a strategy into phases, each with one batch size.

The noise of SGD has the scale g = eps/(1-m) (N/B - 1) (Smith, Kindermans, Ying, Le, "Don't Decay
the Learning Rate, Increase the Batch Size", ICLR 2018, sections 3 and 4; "the paper" below). A
recipe states its falls: milestones at which the noise scale is divided by a factor. A strategy
decides whether a fall divides the learning rate eps, multiplies the batch B, or does both. All
strategies of one recipe share one nominal noise curve. No other code computes a learning rate.

Positions are counted in examples seen. Pure Python; of the package only `mistake` is imported.
"""

import bisect
import dataclasses
import itertools
import math
import operator
from collections.abc import Iterator, Sequence

from bigbatch.mistake import Mistake

COST_TO_NOTE = 0.01  # the share of more updates from which a plan has a note
STRATEGIES = ("constant", "decay", "hybrid", "increase")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The hyperparameters of a run that do not depend on the strategy."""

    learning_rate: float  # eps, after any warm-up and before the first fall
    batch_size: int  # B, examples in an update before the first fall
    momentum: float  # m; for Adam its first beta
    examples: int  # N, examples in the training set
    epochs: float
    falls: tuple[tuple[float, float], ...] = ()  # (epoch, factor that divides the noise scale)
    warmup_epochs: float = 0.0
    warmup_learning_rate: float = 0.0  # the rate (not a factor) at which the linear warm-up starts


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bounds on the batch sizes of a schedule."""

    max_batch_size: int | None = None  # None: no limit
    granularity: int | None = None  # batch sizes are multiples of this; None: of ghost_size
    ghost_size: int = 1  # examples in a ghost batch


@dataclasses.dataclass(frozen=True)
class Phase:
    """A part of a run with one batch size. Examples are counted from the start of the run."""

    index: int
    name: str  # "warmup", "noise/1", "noise/5", ...: the noise scale has been divided by 5
    start_example: int
    end_example: int  # the first update boundary at or after nominal_end_example
    nominal_end_example: int  # round(epoch x N), for the epoch at which the recipe ends the phase
    start_update: int
    updates: int  # their number
    batch_size: int
    learning_rate: float  # at the start of the phase
    learning_rate_end: float  # at its nominal end; differs from learning_rate only in a warm-up
    momentum: float
    noise_scale: float  # eps/(1-m) (N/B - 1), at the start of the phase
    noise_scale_approximate: float  # eps N / (B (1-m)), at the start of the phase
    lost_epochs: float  # B/(N (1-m)), until the momentum's accumulator is filled (appendix A)

    @property
    def shift(self) -> int:
        """The number of examples, less than a batch, from the nominal end to the end."""
        return self.end_example - self.nominal_end_example


def noise_scale(learning_rate: float, momentum: float, examples: int, batch_size: int) -> float:
    """The noise scale of SGD, g = eps/(1-m) (N/B - 1) (paper, section 4)."""
    return learning_rate / (1.0 - momentum) * (examples / batch_size - 1.0)


def noise_scale_approximate(
    learning_rate: float, momentum: float, examples: int, batch_size: int
) -> float:
    """The noise scale for B << N, eps N / (B (1-m)), which all strategies of a recipe share."""
    return learning_rate / (1.0 - momentum) * examples / batch_size


def scale_up(recipe: Recipe, learning_rate_factor: float = 1.0, momentum: float | None = None,
             granularity: int = 1) -> Recipe:
    """The recipe with another learning rate and momentum, and a batch in proportion to eps/(1-m).

    The noise scale stays the same, and a larger rate or momentum needs fewer updates (paper,
    section 5.2). To be called before training. The rate at which a warm-up starts is not scaled.

    Args:
        recipe: the recipe to scale.
        learning_rate_factor: multiplies the rate.
        momentum: the new momentum coefficient; None keeps the recipe's.
        granularity: the new batch size must be a multiple of this.

    Raises:
        Mistake: if the factor or a momentum is out of its range, or if the batch that keeps the
            noise scale is not a multiple of `granularity` or is larger than the training set.
    """
    new_momentum = recipe.momentum if momentum is None else momentum
    _check_momentum("recipe.momentum", recipe.momentum)
    _check_momentum("scale_up.momentum", new_momentum)
    if not (math.isfinite(learning_rate_factor) and learning_rate_factor > 0):
        raise Mistake(
            f"scale_up.learning_rate is {learning_rate_factor}; it is a factor on the rate and "
            "must be a finite number over 0 (1 leaves the rate as it is)."
        )
    batch = (
        recipe.batch_size * learning_rate_factor * (1.0 - recipe.momentum) / (1.0 - new_momentum)
    )
    whole = round(batch / granularity) * granularity
    if whole < 1 or abs(batch - whole) > 1e-6 * whole:
        raise Mistake(
            f"scaling the rate by {learning_rate_factor:g} and the momentum from "
            f"{recipe.momentum:g} to {new_momentum:g} asks for a batch of {batch:g}, which is no "
            f"multiple of {granularity}; change scale_up so that {recipe.batch_size} x rate factor "
            "x (1 - old momentum)/(1 - new momentum) is one."
        )
    if whole > recipe.examples:
        raise Mistake(
            f"scale_up takes the batch from {recipe.batch_size} to {whole}, over the "
            f"{recipe.examples} examples of the training set; scale up by less."
        )
    return dataclasses.replace(
        recipe,
        learning_rate=recipe.learning_rate * learning_rate_factor,
        batch_size=whole,
        momentum=new_momentum,
    )


def plan_phases(
    recipe: Recipe, strategy: str, limits: Limits, hybrid_falls: int = 1
) -> tuple[Phase, ...]:
    """The phases of a run of `recipe` under `strategy`.

    A phase ends at the first update boundary at or after its nominal end, and the next phase begins
    there. So no example is left out or repeated, and all updates of a phase have the same size. A
    grown batch is the first batch times the factors of all falls so far that are the batch's,
    rounded down to the granularity and capped. The learning rate is multiplied by what the batch
    grew at a fall over the fall's factor, so it rises again where a batch makes up for rounding.

    Args:
        recipe: the recipe, after `scale_up` if that is wanted.
        strategy: "constant" (the falls are ignored), "decay" (all falls divide the rate), "hybrid"
            (the first `hybrid_falls` falls multiply the batch, the others divide the rate), or
            "increase" (all falls multiply the batch).
        limits: bounds on the batch sizes.
        hybrid_falls: used by "hybrid" only.

    Raises:
        Mistake: if there is no such schedule; the message has the value and what to change.
    """
    if strategy == "constant":
        recipe = dataclasses.replace(recipe, falls=())
    granularity = _check(recipe, strategy, limits, hybrid_falls)
    n, momentum, falls = recipe.examples, recipe.momentum, recipe.falls
    by_batch = {"constant": 0, "decay": 0, "hybrid": hybrid_falls, "increase": len(falls)}[strategy]

    # The phases as (name, nominal end in epochs, batch, rate at the start, rate at the end).
    batch, rate = recipe.batch_size, recipe.learning_rate
    names = _names(falls)
    planned = []
    if recipe.warmup_epochs > 0:
        planned.append(
            ("warmup", recipe.warmup_epochs, batch, recipe.warmup_learning_rate, rate)
        )
    growth = 1.0  # the product of the factors so far that are for the batch
    for index, (epoch, factor) in enumerate(falls):
        planned.append((names[index], epoch, batch, rate, rate))
        grown = batch
        if index < by_batch:
            # From the first batch and the whole growth: what rounding takes from one fall the next
            # falls make up for.
            growth *= factor
            grown = _grown(batch, growth, recipe, limits, granularity)
        rate *= grown / batch / factor
        batch = grown
    planned.append((names[-1], recipe.epochs, batch, rate, rate))

    phases: list[Phase] = []
    example = update = 0
    for name, epoch, batch, rate, rate_end in planned:
        nominal = round(epoch * n)
        updates = -(-(nominal - example) // batch)
        if updates < 1:
            raise Mistake(
                f"phase {name!r} would have no update: it should end at example {nominal} (epoch "
                f"{epoch:g}), but whole updates before it already reach example {example}; move "
                "the fall, or take a smaller batch or limits.max_batch_size."
            )
        phases.append(Phase(
            index=len(phases), name=name, start_example=example,
            end_example=example + updates * batch, nominal_end_example=nominal,
            start_update=update, updates=updates, batch_size=batch, learning_rate=rate,
            learning_rate_end=rate_end, momentum=momentum,
            noise_scale=noise_scale(rate, momentum, n, batch),
            noise_scale_approximate=noise_scale_approximate(rate, momentum, n, batch),
            lost_epochs=batch / (n * (1.0 - momentum)),
        ))
        example, update = phases[-1].end_example, update + updates
    return tuple(phases)


def phase_at(phases: Sequence[Phase], examples_seen: int) -> Phase | None:
    """The phase of the update that starts at `examples_seen`; None when the run is over."""
    index = bisect.bisect_right([phase.end_example for phase in phases], examples_seen)
    return phases[index] if index < len(phases) else None


def find_phase(phases: Sequence[Phase], name: str, asked_by: str) -> Phase:
    """The phase with this name or number.

    Args:
        phases: of the run.
        name: of the phase, or its index as text.
        asked_by: the command-line flag that has the name, for the message.

    Raises:
        Mistake: if there is no such phase; the message lists the phases.
    """
    for phase in phases:
        if name in (phase.name, str(phase.index)):
            return phase
    named = ", ".join(f"{phase.index} or {phase.name}" for phase in phases)
    raise Mistake(f"{asked_by} names the phase {name!r}; this run's phases are {named}.")


def spans(phases: Sequence[Phase], examples_seen: int) -> Iterator[tuple[int, int]]:
    """Yields the positions at which each update starts and ends, from `examples_seen` on."""
    for phase in phases:
        first = max(phase.start_example, examples_seen)
        for start in range(first, phase.end_example, phase.batch_size):
            yield start, start + phase.batch_size


def learning_rate_at(phase: Phase, examples_seen: int) -> float:
    """The learning rate of the update of `phase` that starts at `examples_seen`.

    In a warm-up the rate is linear in the examples seen, from the start of the phase to its nominal
    end. In any other phase it is constant.
    """
    if phase.learning_rate == phase.learning_rate_end:
        return phase.learning_rate
    passed = (examples_seen - phase.start_example) / (
        phase.nominal_end_example - phase.start_example
    )
    return phase.learning_rate + passed * (phase.learning_rate_end - phase.learning_rate)


def nominal_noise_scale(recipe: Recipe, epoch: float) -> float:
    """The noise scale, in its approximate form, that `recipe` states at `epoch`.

    In a warm-up it rises linearly with the learning rate. After that it is the noise scale before
    the first fall, divided by the factors of all falls at or before `epoch`.
    """
    rate = recipe.learning_rate
    if epoch < recipe.warmup_epochs:
        start = recipe.warmup_learning_rate
        rate = start + (rate - start) * epoch / recipe.warmup_epochs
    first = noise_scale_approximate(rate, recipe.momentum, recipe.examples, recipe.batch_size)
    return first / math.prod(factor for at, factor in recipe.falls if at <= epoch)


def exact_updates(recipe: Recipe, strategy: str, hybrid_falls: int = 1) -> float:
    """The updates of batches that follow the noise exactly: neither rounded nor capped.

    Args:
        recipe: see `plan_phases`.
        strategy: see there.
        hybrid_falls: see there.
    """
    ends = [*(epoch for epoch, _ in recipe.falls), recipe.epochs]
    taken = {"increase": len(recipe.falls), "hybrid": hybrid_falls}.get(strategy, 0)
    factors = [factor if index < taken else 1.0 for index, (_, factor) in enumerate(recipe.falls)]
    growths = itertools.accumulate(factors, operator.mul, initial=1.0)
    starts = [0.0, *ends[:-1]]
    return sum((end - start) * recipe.examples / (recipe.batch_size * growth)
               for start, end, growth in zip(starts, ends, growths, strict=True))


def notes(
    recipe: Recipe, phases: Sequence[Phase], strategy: str, hybrid_falls: int = 1
) -> list[str]:
    """Warnings for the plan: what rounding and limits cost, and the phases whose approximate noise
    scale is far from the exact one.

    Args:
        recipe: of the plan.
        phases: of the plan.
        strategy: of the plan.
        hybrid_falls: only read by "hybrid".
    """
    made = sum(phase.updates for phase in phases)
    exact = exact_updates(recipe, strategy, hybrid_falls)
    costs = []
    if made - exact > COST_TO_NOTE * exact + len(phases):  # each phase ends on a whole update
        costs.append(
            f"batches that followed the noise exactly would take {exact:.0f} updates. That batches "
            "are rounded down to multiples of limits.granularity (ghost_size if unset) and kept to "
            f"limits.max_batch_size costs {made - exact:.0f} more; the rate makes up the noise."
        )
    return costs + [
        f"{phase.name}: batch {phase.batch_size} is over a tenth of the {recipe.examples} training "
        f"examples; the exact noise scale is {phase.batch_size / recipe.examples:.1%} below the "
        "approximate one that the schedules share."
        for phase in phases
        if phase.batch_size > recipe.examples / 10
    ]


def _names(falls: Sequence[tuple[float, float]]) -> list[str]:
    """A name for each level of the noise: by how much it is divided, in as few digits as differ."""
    divided = list(itertools.accumulate((factor for _, factor in falls), operator.mul, initial=1.0))
    for digits in (6, 9, 12, 17):
        names = [f"noise/{value:.{digits}g}" for value in divided]
        if len(set(names)) == len(names):
            break
    return names


def _grown(
    batch: int, growth: float, recipe: Recipe, limits: Limits, granularity: int
) -> int:
    """The recipe's batch multiplied by `growth`, rounded down to the granularity, and capped.

    `batch` is the one before, for the message.

    Raises:
        Mistake: if no limit is set and the batch would be larger than the training set.
    """
    # The factor just over 1 keeps rounding errors from turning a multiple into one multiple less.
    grown = int(recipe.batch_size * growth * (1 + 1e-12) // granularity) * granularity
    if limits.max_batch_size is not None:
        return min(grown, limits.max_batch_size)
    if grown > recipe.examples:
        limit = max(recipe.examples // 10 // granularity * granularity, recipe.batch_size)
        raise Mistake(
            f"the batch would grow from {batch} to {grown}, past the {recipe.examples} training "
            f"examples; set limits.max_batch_size, for example to {limit} (the noise scales agree "
            "while the batch is below about a tenth of the training set)."
        )
    return grown


def _check_momentum(name: str, momentum: float) -> None:
    if not 0.0 <= momentum < 1.0:
        raise Mistake(f"{name} is {momentum}; it must lie in [0, 1).")


def _check(recipe: Recipe, strategy: str, limits: Limits, hybrid_falls: int) -> int:
    """Raises Mistake for a value that no schedule can have; returns the granularity."""
    if strategy not in STRATEGIES:
        raise Mistake(f"strategy is {strategy!r}; allowed are {', '.join(STRATEGIES)}.")
    if strategy == "hybrid" and not 0 <= hybrid_falls <= len(recipe.falls):
        raise Mistake(
            f"hybrid_falls is {hybrid_falls}; the recipe has {len(recipe.falls)} falls, so it "
            f"must lie between 0 and {len(recipe.falls)}."
        )
    _check_momentum("recipe.momentum", recipe.momentum)
    for name in ("learning_rate", "examples", "epochs"):
        value = getattr(recipe, name)
        if not (math.isfinite(value) and value > 0):
            raise Mistake(f"recipe.{name} is {value}; it must be a finite number over 0.")
    _check_batches(recipe, limits)

    before = 0.0
    for epoch, factor in recipe.falls:
        if not (math.isfinite(factor) and factor > 1):
            raise Mistake(
                f"the noise scale falls by a factor of {factor} at epoch {epoch:g}; factors must "
                "be finite and over 1 (they divide the noise scale)."
            )
        if not before < epoch < recipe.epochs:
            raise Mistake(
                f"the falls are at epochs {[at for at, _ in recipe.falls]} of {recipe.epochs:g}; "
                "each must come after the one before it, over 0 and below the end, which "
                f"{epoch:g} does not: change recipe.falls or recipe.epochs."
            )
        before = epoch

    end = recipe.falls[0][0] if recipe.falls else recipe.epochs
    if not 0 <= recipe.warmup_epochs < end:
        raise Mistake(
            f"recipe.warmup_epochs is {recipe.warmup_epochs:g}; a warm-up must end before the "
            f"first fall or the end of the run, which is at epoch {end:g}."
        )
    if recipe.warmup_epochs and not 0 <= recipe.warmup_learning_rate <= recipe.learning_rate:
        raise Mistake(
            f"recipe.warmup_learning_rate is {recipe.warmup_learning_rate:g}; it must lie between "
            f"0 and recipe.learning_rate, {recipe.learning_rate:g}, to which the warm-up rises."
        )
    return limits.ghost_size if limits.granularity is None else limits.granularity


def _check_batches(recipe: Recipe, limits: Limits) -> None:
    """Raises Mistake for a batch size over the training set or not a whole number of ghosts."""
    ghost = limits.ghost_size
    if ghost < 1:
        raise Mistake(f"ghost_size is {ghost}; it must be 1 or more.")
    granularity = ghost if limits.granularity is None else limits.granularity
    if granularity < 1 or granularity % ghost:
        raise Mistake(
            f"limits.granularity is {granularity}; it must be a multiple of the ghost batch of "
            f"{ghost}, so that every batch is a whole number of ghost batches."
        )
    named = [("recipe.batch_size", recipe.batch_size)]
    if limits.max_batch_size is not None:
        named.append(("limits.max_batch_size", limits.max_batch_size))
    for name, batch in named:
        if batch < 1 or batch % granularity:
            below = max(batch, 0) // granularity * granularity
            nearest = sorted({max(below, granularity), below + granularity})
            raise Mistake(
                f"{name} is {batch}; it must be a multiple of {granularity} "
                f"({'the ghost batch' if granularity == ghost else 'limits.granularity'}), for "
                f"example {' or '.join(map(str, nearest))}."
            )
        if batch > recipe.examples:
            raise Mistake(
                f"{name} is {batch}, over the {recipe.examples} examples of the training set; "
                "a batch may hold the whole set at most."
            )
    if limits.max_batch_size is not None and limits.max_batch_size < recipe.batch_size:
        raise Mistake(
            f"limits.max_batch_size is {limits.max_batch_size}, below the first batch of "
            f"{recipe.batch_size}; raise it or lower the batch (scale_up raises the batch too)."
        )
