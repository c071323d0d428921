"""The table of a schedule: all that a loop needs, and the same from wherever it is read."""

import dataclasses

import pytest

from bigbatch import schedule
from bigbatch.mistake import Mistake
from bigbatch.schedule import Limits, Recipe, Strategy

RECIPE = Recipe(
    learning_rate=0.1, batch_size=4, momentum=0.9, examples=50, epochs=6, curve="cosine")
LIMITS = Limits(max_batch_size=16, granularity=2)


@pytest.mark.parametrize("strategy", [
    "constant", "decay", "increase", "hybrid", Strategy("by_hand", by_hand=((2, 6), (4, 10))),
    Strategy("increase", ramp=((0.5, 2),))])
def test_the_rows_are_the_updates_of_the_phases(strategy):
    table = schedule.make_table(RECIPE, strategy, LIMITS)
    rows = list(schedule.rows(table))
    assert [(row.start, row.start + row.batch_size) for row in rows] == list(
        schedule.spans(table.phases, 0))
    assert [row.update for row in rows] == list(range(table.updates))
    assert rows[-1].start + rows[-1].batch_size == table.examples
    for row in rows:
        assert row == schedule.row(table, row.update)
        assert schedule.update_at(table, row.start) == row.update
        assert row.rates == schedule.take_rates(
            table.recipe, table.phases, schedule.phase_at(table.phases, row.start), row.start,
            row.start + row.batch_size)


def test_a_table_goes_on_from_any_update():
    table = schedule.make_table(RECIPE, "increase", LIMITS)
    rows = list(schedule.rows(table))
    for row in rows:
        assert list(schedule.rows(table, row.start)) == rows[row.update :]
    assert list(schedule.rows(table, table.examples)) == []


def test_rows_are_computed_when_they_are_asked_for():
    long = dataclasses.replace(RECIPE, examples=10**9, epochs=100)
    table = schedule.make_table(long, "decay", Limits())
    assert next(schedule.rows(table, 4 * 10**9)).update == 10**9


@pytest.mark.parametrize("example", [-4, 1, 302, 10**6])
def test_a_position_at_which_no_update_starts_is_refused(example):
    table = schedule.make_table(RECIPE, "decay", LIMITS)
    assert table.examples == 300
    with pytest.raises(Mistake, match=f"no update of this schedule starts at example {example}"):
        schedule.rows(table, example)


@pytest.mark.parametrize("update", [-1, 75])
def test_an_update_that_is_not_there_is_refused(update):
    table = schedule.make_table(RECIPE, "decay", LIMITS)
    with pytest.raises(Mistake, match=f"no update {update}; this schedule has 75, from 0 on"):
        schedule.row(table, update)
