"""The rules by which a run decides that its batch grows, and the phases that follow from it."""

import dataclasses
import itertools
import math
import random

import pytest

from bigbatch import schedule
from bigbatch.mistake import Mistake
from bigbatch.schedule import Limits, Recipe, Strategy, deciding
from bigbatch.schedule.deciding import Rule, Seen

STATED = Recipe(0.1, 48, 0.9, 1437, 6, falls=((2, 5), (4, 5)))
LIMITS = Limits(400, ghost_size=16)
# A gradient of 0.02 under noise of 3 an example: B_simple is 150.
SEEN = Seen(gradient_square=0.02, trace=3.0, loss=0.6, batch_size=96, first_batch=48,
            reference_rate=0.1)


def test_each_rule_names_the_batch_that_its_source_says():
    assert deciding.wanted(Rule("noise"), SEEN) == pytest.approx(150)
    assert deciding.wanted(Rule("noise", 0.5), SEEN) == pytest.approx(75)
    # Byrd et al.: the variance tr/B of a batch of that size is theta^2 |g|^2.
    batch = deciding.wanted(Rule("norm_test", 0.7), SEEN)
    assert 3.0 / batch == pytest.approx(0.7**2 * (0.02 + 3.0 / 96))
    # AdaScale: the gain of S times the batch is a share of S.
    scale = deciding.wanted(Rule("adascale", 0.6), SEEN) / 48
    variance = 3.0 / 48
    assert (variance + 0.02) / (variance / scale + 0.02) == pytest.approx(0.6 * scale)
    assert deciding.wanted(Rule("cabs"), SEEN) == pytest.approx(0.1 * 3.0 / 0.6)
    losses = Rule("loss", losses=((2.0, 96), (0.7, 192), (0.5, 384)))
    assert deciding.wanted(losses, SEEN) == 192
    assert deciding.wanted(losses, SEEN._replace(loss=9.0)) is None
    lost = SEEN._replace(gradient_square=-0.001)  # in its error: no gradient is seen at all
    assert deciding.wanted(Rule("noise"), lost) is deciding.wanted(Rule("adascale"), lost) is None
    assert deciding.wanted(Rule("norm_test"), lost) == pytest.approx(
        3.0 / (0.25 * (3.0 / 96 - 0.001)))


@pytest.mark.parametrize(("rule", "told"), (
    (Rule("nose"), "measured.rule is 'nose'; allowed are noise, norm_test, adascale, cabs, loss"),
    (Rule("noise", -1.0), "measured.threshold is -1"),
    (Rule("loss"), "measured.losses is"),
    (Rule("loss", losses=((0.5, 96), (math.nan, 192))), r"has \(nan, 192\); a loss must be"),
    (Rule("loss", losses=((0.5, -3),)), r"has \(0.5, -3\); .* the batch that it allows 1 or more"),
    (Rule("loss", losses=((1.0, 96), (2.0, 192))), r"are at \[1.0, 2.0\]; each must be below"),
))
def test_a_rule_that_is_none_is_told(rule, told):
    with pytest.raises(Mistake, match=told):
        deciding.check(rule)


@pytest.mark.parametrize(("name", "never", "some", "most"), (
    ("norm_test", {"threshold": 0.8}, {"threshold": 0.7}, "75 in updates of 48"),
    ("norm_test", {"threshold": 1.0}, {}, "48 in updates"),
    ("adascale", {"threshold": 1.0}, {"threshold": 0.99}, "48 in updates"),
    ("loss", {"losses": ((0.5, 95),)}, {"losses": ((0.5, 95), (-1.0, 96))}, "95 in"),
))
def test_a_rule_by_which_no_batch_can_ever_grow_is_refused(name, never, some, most):
    """It has a largest answer, whatever it sees."""
    rungs, draw = deciding.ladder(STATED, LIMITS), random.Random(0)

    def grows(rule):
        return any(deciding.decide(rule, rungs, (), 1000, deciding.wanted(rule, Seen(
            *(10 ** draw.uniform(-9, 9) for _ in range(3)), rungs[0], rungs[0], 0.1)._replace(
                loss=draw.uniform(-2, 2)))) for _ in range(1000))

    deciding.check_reach(Rule(name, **some), rungs)
    assert grows(Rule(name, **some))
    with pytest.raises(Mistake, match=f"measured.*{most}.*The next batch is 96, so none"):
        deciding.check_reach(Rule(name, **never), rungs)
    assert not grows(Rule(name, **never))


def test_the_ladder_is_that_of_growing_batches_and_needs_an_end():
    assert deciding.ladder(STATED, LIMITS) == (48, 96, 192, 384)
    assert deciding.ladder(STATED, dataclasses.replace(LIMITS, growth=3.0)) == (48, 144)
    with pytest.raises(Mistake, match="measured has no largest batch: set limits.max_batch_size"):
        deciding.ladder(STATED, Limits(ghost_size=16))
    alone = deciding.ladder(STATED, dataclasses.replace(LIMITS, max_batch_size=64))
    with pytest.raises(Mistake, match="no batch to grow to: 48 is the first, .*max_batch_size"):
        deciding.check_reach(Rule("noise"), alone)
    with pytest.raises(Mistake, match="takes no ramp"):
        schedule.plan_phases(STATED, Strategy("measured", ramp=((1, 3),)), LIMITS)


def test_what_is_decided_on_the_way_has_no_table():
    with pytest.raises(Mistake, match="measured has no table: it decides while a run trains"):
        schedule.make_table(STATED, "measured", LIMITS)


def test_it_grows_by_one_rung_after_a_stay_and_never_back():
    rungs, rule = deciding.ladder(STATED, LIMITS), Rule(every=100, stay=500)

    def decide(decisions, example, asked_for):
        return deciding.decide(rule, rungs, decisions, example, asked_for)

    assert decide((), 480, 1e9) == ()  # not long enough on the first batch
    assert decide((), 528, 95) == decide((), 528, None) == ()
    once = decide((), 528, 1e9)
    assert once == ((528, 96),)
    assert decide(once, 1008, 1e9) == once == decide(once, 1104, 1.0)
    twice = decide(once, 1104, 192.0)
    assert twice == ((528, 96), (1104, 192))
    assert decide(((9, 384),), 5000, math.inf) == ((9, 384),)


def every_update(decisions):
    """(example, batch, rate) of each update."""
    phases = schedule.plan_phases(STATED, Strategy("measured", decisions=decisions), LIMITS)
    return phases, [
        (start, end - start, schedule.take_rates(STATED, phases, phase, start, end))
        for phase in phases for start, end in schedule.spans([phase], 0)]


def test_the_phases_before_a_decision_stay_and_the_noise_is_the_references_throughout():
    """At every update boundary of a run, also just after a fall and within one update of one."""
    _, alone = every_update(())
    assert [batch for _, batch, _ in alone] == [48] * len(alone)
    for position, _, _ in alone[1:]:
        phases, updates = every_update(((position, 192),))  # `take_rates` checks the noise
        assert [update for update in updates if update[0] < position] == [
            update for update in alone if update[0] < position]
        assert all(batch == 192 for start, batch, _ in updates if start >= position)
        assert phases[-1].end_example - 192 < 6 * 1437 <= phases[-1].end_example
        by_hand = Strategy("by_hand", by_hand=((position / 1437, 192),))
        assert schedule.plan_phases(STATED, by_hand, LIMITS) == phases  # a replay


@pytest.mark.parametrize(("every", "stay"), list(itertools.product((1, 100, 700), (0, 333, 2000))))
def test_the_soonest_decisions_are_those_of_a_run_that_always_asks_for_more(every, stay):
    rungs, rule = deciding.ladder(STATED, LIMITS), Rule(every=every, stay=stay)
    decisions, example, last = (), 0, round(STATED.epochs * STATED.examples)
    while example < last:
        batch = decisions[-1][1] if decisions else 48
        due = (example + batch) // every > example // every
        example += batch
        if due and example < last:
            decisions = deciding.decide(rule, rungs, decisions, example, math.inf)
    assert deciding.soonest(STATED, rule, rungs) == decisions
    phases, _ = every_update(decisions)
    assert {phase.batch_size for phase in phases} == {48, *(batch for _, batch in decisions)}
