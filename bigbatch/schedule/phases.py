"""Turns a recipe and a strategy into phases, each with one batch size.

The noise of SGD has the scale g = eps/(1-m) (N/B - 1) (Smith, Kindermans, Ying, Le, "Don't Decay
the Learning Rate, Increase the Batch Size", ICLR 2018, sections 3 and 4; "the paper" below). A
recipe states its noise by a reference: one batch, and a learning rate that falls. A strategy
decides one thing, the batch's path. The rate follows from it and from the reference (`rates`), so
all strategies of one recipe have one curve of noise.

Positions are counted in examples seen. Pure Python; of the package only `mistake` is imported.
"""

import bisect
import dataclasses
from collections.abc import Iterator, Sequence

from bigbatch.mistake import Mistake
from bigbatch.schedule import batches, rates, recipe
from bigbatch.schedule.batches import Mark, Strategy
from bigbatch.schedule.recipe import Limits, Recipe


@dataclasses.dataclass(frozen=True)
class Phase:
    """A part of a run with one batch size. Examples are counted from the start of the run."""

    index: int
    # "warmup"; "noise/1", "noise/5", ...: the noise has been divided by 5; "rate/5" with the
    # exchange "none"; "tail" of the curve wsd; "epoch/30", by hand; with "+ramp/4" in a ramp.
    name: str
    start_example: int
    end_example: int  # the first update boundary at or after nominal_end_example
    nominal_end_example: int  # round(epoch x N), for the epoch at which the recipe ends the phase
    start_update: int
    updates: int  # their number
    batch_size: int
    learning_rate: float  # at the start of the phase
    learning_rate_end: float  # at its nominal end; another one in a warm-up and in a smooth curve
    momentum: float
    noise_scale: float  # eps/(1-m) (N/B - 1), at the start of the phase
    noise_scale_approximate: float  # eps N / (B (1-m)), at the start of the phase
    lost_epochs: float  # B/(N (1-m)), until the momentum's accumulator is filled (appendix A)

    @property
    def shift(self) -> int:
        """The number of examples, less than a batch, from the nominal end to the end."""
        return self.end_example - self.nominal_end_example


def plan_phases(
    stated: Recipe, strategy: str | Strategy, limits: Limits, hybrid_falls: int = 1
) -> tuple[Phase, ...]:
    """The phases of a run of a recipe under a strategy.

    A phase ends at the first update boundary at or after its nominal end, and the next phase begins
    there. So no example is left out or repeated, and all updates of a phase have the same size.

    A batch that grows follows the reference's rate: the first batch divided by what is left of the
    peak of this rate, rounded down to the granularity and capped. At falls it is set anew at every
    fall; under a smooth curve it takes those of `batches.growths`, each as soon as the rate has
    fallen as far. What a batch does not take, the rate does (see `rates`).

    Args:
        stated: the recipe, after `scale_up` if that is wanted.
        strategy: a `Strategy`, or only its name: "constant" (the rate does not fall), "decay" (one
            batch), "hybrid" (the first `hybrid_falls` falls or growths are the batch's), "increase"
            (all are), or "by_hand".
        limits: bounds on the batch sizes.
        hybrid_falls: used by the name "hybrid" only.

    Raises:
        Mistake: if there is no such schedule; the message has the value and what to change.
    """
    if isinstance(strategy, str):
        strategy = Strategy(strategy, hybrid_falls)
    stated = recipe.stated(stated, strategy.name)
    granularity = recipe.check(stated, strategy.name, limits)
    marks = batches.marks(stated, strategy, limits, granularity)
    last = round(stated.epochs * stated.examples)
    ends = [*((mark.example, mark.epoch) for mark in marks[1:]), (last, stated.epochs)]

    phases: list[Phase] = []
    example = update = 0
    for mark, (nominal, epoch) in zip(marks, ends, strict=True):
        batch = mark.batch
        updates = -(-(nominal - example) // batch)
        if updates < 1:
            if mark.passable:
                continue
            raise Mistake(
                f"phase {mark.name!r} would have no update: it should end at example {nominal} "
                f"(epoch {epoch:g}), but whole updates before it already reach example {example}; "
                "move the fall, or take a smaller batch or limits.max_batch_size."
            )
        phases.append(_phase(stated, mark, example, update, updates, nominal, len(phases)))
        example, update = phases[-1].end_example, update + updates
    _check_floors(stated, phases)
    return tuple(phases)


def _phase(
    stated: Recipe, mark: Mark, example: int, update: int, updates: int, nominal: int, index: int
) -> Phase:
    """A phase with all that follows from its batch and its place."""
    n, batch = stated.examples, mark.batch
    momentum = rates.momentum_of(stated, batch)
    rate = rates.learning_rate_of(stated, rates.reference_rate(stated, example), batch)
    end = rates.reference_rate(stated, nominal)
    if stated.curve == "steps":  # the end does not yet count the fall that is there
        warm = rates.warmup_end(stated)
        if example >= warm:
            end = rates.reference_rate(stated, example)
        elif nominal == warm:
            end = stated.learning_rate
    return Phase(
        index=index, name=mark.name, start_example=example,
        end_example=example + updates * batch, nominal_end_example=nominal,
        start_update=update, updates=updates, batch_size=batch, learning_rate=rate,
        learning_rate_end=rates.learning_rate_of(stated, end, batch), momentum=momentum,
        noise_scale=rates.noise_scale(rate, momentum, n, batch),
        noise_scale_approximate=rates.noise_scale_approximate(rate, momentum, n, batch),
        lost_epochs=batch / (n * (1.0 - momentum)),
    )


def _check_floors(stated: Recipe, phases: Sequence[Phase]) -> None:
    """Raises Mistake if a coefficient that is kept per example falls below its floor."""
    for phase in phases:
        if phase.batch_size > stated.batch_size:
            found = rates.rates_at(stated, phase.batch_size, phase.start_example)
            recipe.check_floors(
                stated, found.momentum, found.beta2,
                f"in phase {phase.name!r} with its batch of {phase.batch_size}")


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


def take_rates(
    stated: Recipe, phases: Sequence[Phase], phase: Phase, start: int, end: int
) -> rates.Rates:
    """What the update from position `start` to `end` takes, checked against the stated noise.

    Args:
        stated: the recipe, as its strategy follows it (`recipe.stated`).
        phases: of the run.
        phase: of the update.
        start: the examples seen before the update.
        end: and after it.

    Raises:
        NoiseDiffers: if the update would not have the noise that the recipe states.
    """
    changes = start == phase.start_example and phase.index
    taken = rates.rates_at(
        stated, end - start, start, phases[phase.index - 1].batch_size if changes else None)
    rates.check_noise(stated, taken.learning_rate, end - start, start)
    return taken
