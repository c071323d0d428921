"""A schedule as a table: for each update the example at which it starts, its batch and its rates.

A training loop of any framework needs no more than this. A row is computed when it is asked for,
from the update's number alone, so a run that was stopped goes on from any update. Pure Python.
"""

import bisect
import itertools
import operator
from collections.abc import Iterator
from typing import NamedTuple

from bigbatch.mistake import Mistake
from bigbatch.schedule import recipe as recipes
from bigbatch.schedule.batches import Strategy
from bigbatch.schedule.phases import Phase, phase_at, plan_phases, take_rates
from bigbatch.schedule.rates import Rates
from bigbatch.schedule.recipe import Limits, Recipe


class Row(NamedTuple):
    """One update."""

    update: int  # counted from 0
    start: int  # the examples seen before it
    batch_size: int  # the examples it takes
    rates: Rates


class Table(NamedTuple):
    """All updates of a run; `row` and `rows` read it."""

    recipe: Recipe  # as the strategy follows it
    phases: tuple[Phase, ...]

    @property
    def updates(self) -> int:
        """Their number."""
        return self.phases[-1].start_update + self.phases[-1].updates

    @property
    def examples(self) -> int:
        """The examples that all of them take."""
        return self.phases[-1].end_example


def make_table(
    recipe: Recipe, strategy: str | Strategy, limits: Limits, hybrid_falls: int = 1
) -> Table:
    """The table of a run of a recipe under a strategy.

    Args:
        recipe: see `plan_phases`, also for the others.
        strategy: a name or a `Strategy`.
        limits: bounds on the batch sizes.
        hybrid_falls: used by the name "hybrid" only.

    Raises:
        Mistake: if there is no such schedule; the message has the value and what to change.
    """
    name = strategy if isinstance(strategy, str) else strategy.name
    if name == "measured":
        raise Mistake("the strategy measured has no table: it decides while a run trains.")
    phases = plan_phases(recipe, strategy, limits, hybrid_falls)
    return Table(recipes.stated(recipe, name), phases)


def row(table: Table, update: int) -> Row:
    """The row of an update.

    Raises:
        Mistake: if there is no such update.
    """
    if not 0 <= update < table.updates:
        raise Mistake(f"there is no update {update}; this schedule has {table.updates}, from 0 on.")
    index = bisect.bisect_right(table.phases, update, key=operator.attrgetter("start_update")) - 1
    phase = table.phases[index]
    start = phase.start_example + (update - phase.start_update) * phase.batch_size
    return Row(update, start, phase.batch_size, take_rates(
        table.recipe, table.phases, phase, start, start + phase.batch_size))


def update_at(table: Table, example: int) -> int:
    """The number of the update that starts when `example` examples have been seen.

    Raises:
        Mistake: if none starts there, as where a run has begun with another schedule.
    """
    phase = phase_at(table.phases, example)
    if example == table.examples:
        return table.updates
    if phase is None or (example - phase.start_example) % phase.batch_size or example < 0:
        raise Mistake(
            f"no update of this schedule starts at example {example}; was the run begun with "
            "another recipe, strategy or limits? Continue it with those."
        )
    return phase.start_update + (example - phase.start_example) // phase.batch_size


def rows(table: Table, from_example: int = 0) -> Iterator[Row]:
    """The rows in order, from the update that starts at `from_example` on.

    Raises:
        Mistake: if no update starts there; at once, not when the first row is taken.
    """
    first = update_at(table, from_example)
    return map(row, itertools.repeat(table), range(first, table.updates))
