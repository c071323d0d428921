"""The course of a run: what it does from its first example to its last, as far as that is known.

It follows from the config, from the number of devices, and, where the run decides when its batch
grows, from what it has decided so far. After a decision the course is made anew; what lies before
it stays the same.
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

from ml_collections import ConfigDict

from bigbatch import schedule
from bigbatch.config.meaning import (
    epochs_of,
    evaluations,
    make_due,
    make_layouts,
    make_limits,
    make_phases,
    make_recipe,
    make_rule,
    noise_window,
)
from bigbatch.mistake import Mistake
from bigbatch.schedule import Phase, deciding, due
from bigbatch.schedule.layout import Layout
from bigbatch.schedule.rates import Rates


class Course(NamedTuple):
    """What a run does, as far as it is known."""

    phases: tuple[Phase, ...]
    last: int  # the index of the phase to stop after
    layouts: tuple[Layout, ...]  # one for each phase
    # phase, examples seen before and after -> the rates of that update
    rates_at: Callable[[Phase, int, int], Rates]
    is_due: Callable[[str, int, int], bool]  # see `schedule.due.make_due`

    def phase_at(self, examples_seen: int) -> Phase | None:
        """The phase of the update that starts there; None where there is nothing left to do."""
        return schedule.phase_at(self.phases[: self.last + 1], examples_seen)

    def to_run(self, examples_seen: int) -> tuple[tuple[Phase, ...], tuple[Layout, ...]]:
        """The phases still to run and their layouts; the first phase may be under way."""
        phase = self.phase_at(examples_seen)
        rest = slice(phase.index, self.last + 1) if phase else slice(0)
        return self.phases[rest], self.layouts[rest]


def make_course(
    config: ConfigDict, decisions: schedule.Decisions | None, devices: int, last_phase: str = ""
) -> Course:
    """The course of a run.

    Args:
        config: of the run.
        decisions: see `make_phases`.
        devices: that share each update.
        last_phase: the name or number of the phase to stop after; "" for the last one.

    Raises:
        Mistake: if there is no such schedule or phase, or no layout for it.
    """
    phases = make_phases(config, decisions)
    last = phases[-1]
    if last_phase:
        last = schedule.find_phase(phases, last_phase, "--stop_after_phase")
    return Course(
        phases, last.index, tuple(make_layouts(config, phases, devices)),
        functools.partial(schedule.take_rates, make_recipe(config), phases),
        make_due(config, phases[-1].end_example))


def due_ends(config: ConfigDict, course: Course, examples_seen: int, key: str) -> Iterator[int]:
    """The examples seen after each update to come after which what has this interval is due.

    Args:
        config: of the run.
        course: of the run.
        examples_seen: its position.
        key: as "eval_every_epochs".
    """
    phases, _ = course.to_run(examples_seen)
    return evaluations(config, phases, examples_seen, course.phases[-1].end_example, key)


def make_steering(config: ConfigDict) -> deciding.Steering | None:
    """What decides when the batch of a run grows; None where that is stated in advance.

    Raises:
        Mistake: if it would have nothing to decide by, or no largest batch.
    """
    if config.strategy != "measured":
        return None
    stated, by_all = make_recipe(config), config.measured.by == "all"
    every = due.interval(epochs_of(config, "noise.every_epochs"), config.data.train_examples)
    return deciding.Steering(
        make_rule(config), deciding.ladder(stated, make_limits(config)), stated, by_all,
        noise_window(config), every)


def check_steering(
    steering: deciding.Steering, copied_for: int, stop_after_phase: str
) -> None:
    """Checks that a run has something to decide by.

    Args:
        steering: see `make_steering`.
        copied_for: of the network, see `update.network.Network`.
        stop_after_phase: see `train.train_and_evaluate`.

    Raises:
        Mistake: if it has nothing, or is to stop where it has not decided to end a phase.
    """
    if stop_after_phase:
        raise Mistake(
            f"--stop_after_phase={stop_after_phase}: with the strategy measured a run decides on "
            "its way where its phases end; stop it by a signal.")
    if steering.by_all or steering.rule.name == "loss":
        return
    if 0 < steering.rungs[0] <= copied_for:
        raise Mistake(
            f"recipe.batch_size is {steering.rungs[0]}, a single ghost batch, in which no noise is "
            "measured by the norms: take a larger batch or a smaller ghost_size, or set "
            "config.measured.by to 'all' and config.noise.every_epochs to how often.")
    if not copied_for:
        raise Mistake(
            "config.measured.by is 'norms', but the network has no layers of normalisation by "
            "which the noise is measured (docs/noise.md); set it to 'all', and "
            "config.noise.every_epochs to how often.")
