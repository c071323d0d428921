"""Smooth curves, exchanges, ramps and batches by hand: every update has the noise that is stated.

The references are Optax's schedules, closed forms, and a plain statement of the rule in this file.
"""

import dataclasses
import itertools
import math

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as draw

from bigbatch import schedule
from bigbatch.mistake import Mistake
from bigbatch.schedule import Limits, PerExample, Recipe, Strategy, batches, curves, rates

CIFAR = Recipe(
    learning_rate=0.1, batch_size=128, momentum=0.9, examples=50_000, epochs=204.8,
    falls=((60, 5), (120, 5), (160, 5)),
)
COSINE = dataclasses.replace(CIFAR, curve="cosine")
TO_5120 = Limits(max_batch_size=5120, ghost_size=128)
POWERS = {"linear": 1.0, "sqrt": 0.5, "none": 0.0}


# --- the curves -----------------------------------------------------------------------------------
@pytest.mark.parametrize(("curve", "settings", "reference"), (
    ("cosine", {}, optax.cosine_decay_schedule(1.0, 1)),
    ("cosine", {"final_share": 0.1}, optax.cosine_decay_schedule(1.0, 1, alpha=0.1)),
    ("linear", {"final_share": 0.25}, optax.linear_schedule(1.0, 0.25, 1)),
    ("polynomial", {"power": 2.0, "final_share": 0.1}, optax.polynomial_schedule(1.0, 0.1, 2.0, 1)),
    ("exponential", {"final_share": 0.01}, optax.exponential_decay(1.0, 1, 0.01)),
    ("inverse_sqrt", {"final_share": 0.1}, lambda x: (1 + 99 * x) ** -0.5),
    ("wsd", {"tail_share": 0.25}, optax.join_schedules(
        [optax.constant_schedule(1.0), optax.linear_schedule(1.0, 0.0, 0.25)], [0.75])),
    ("wsd", {"tail_share": 0.5, "tail_shape": "1-sqrt", "final_share": 0.1},
     lambda x: 1.0 if x < 0.5 else 0.1 + 0.9 * (1 - math.sqrt((x - 0.5) / 0.5))),
    ("wsd", {"tail_share": 1.0, "tail_shape": "cosine"}, optax.cosine_decay_schedule(1.0, 1)),
))
def test_curves_are_those_of_optax_or_their_closed_form(curve, settings, reference):
    shape = curves.make_shape(curve, **settings)
    for index in range(101):
        # Float32 has the other side.
        assert shape(index / 100) == pytest.approx(float(reference(index / 100)), abs=1e-6)


def test_a_warm_up_and_a_cosine_are_optaxs():
    recipe = dataclasses.replace(COSINE, warmup_epochs=5, warmup_learning_rate=0.01)
    theirs = optax.warmup_cosine_decay_schedule(0.01, 0.1, 250_000, 10_240_000, 0.0)
    for example in (0, 128, 100_000, 249_999, 250_000, 1_000_000, 5_000_000, 10_239_872):
        assert schedule.reference_rate(recipe, example) == pytest.approx(
            float(theirs(example)), abs=1e-7)


def test_the_usual_inverse_square_root_after_a_warm_up():
    """peak sqrt(warm-up/epoch) (Vaswani et al., 2017) ends at the share sqrt(warm-up/epochs)."""
    recipe = dataclasses.replace(
        CIFAR, curve="inverse_sqrt", epochs=100, warmup_epochs=4,
        final_share=math.sqrt(4 / 100))
    for epoch in (4, 5, 16, 64, 100):
        assert schedule.reference_rate(recipe, epoch * 50_000) == pytest.approx(
            0.1 * math.sqrt(4 / epoch), rel=1e-12)


# --- the formula, at every update -----------------------------------------------------------------
@draw.composite
def plans(drawn):
    """(recipe, strategy, limits) of every kind; some have no schedule."""
    pick = drawn
    ghost = pick(draw.sampled_from((1, 4, 16)))
    granularity = ghost * pick(draw.integers(1, 3))
    batch = granularity * pick(draw.integers(1, 8))
    examples = batch * pick(draw.integers(20, 200)) + pick(draw.integers(0, 50))
    epochs = pick(draw.floats(3, 20))
    epoch = draw.floats(0.01, 0.99).map(lambda share: round(share * epochs, 3))
    marks = draw.lists(epoch, max_size=4, unique=True).map(sorted)
    factor = draw.sampled_from((2.0, 4.0, 1.5, 3.7, 10.0))
    optimizer_adds = pick(draw.booleans())
    curve = pick(draw.sampled_from(schedule.CURVES))
    recipe = Recipe(
        learning_rate=pick(draw.floats(1e-4, 10)), batch_size=batch,
        momentum=pick(draw.sampled_from((0.0, 0.5, 0.9, 0.98))), examples=examples, epochs=epochs,
        falls=tuple((at, pick(factor)) for at in pick(marks)),
        curve=curve, final_share=pick(draw.sampled_from((0.01, 0.1, 0.5))),
        power=pick(draw.floats(0.3, 4)), tail_share=pick(draw.floats(0.05, 1)),
        tail_shape=pick(draw.sampled_from(tuple(schedule.TAILS))),
        exchange=pick(draw.sampled_from(tuple(POWERS))), accumulates=optimizer_adds,
        per_example=PerExample(momentum=pick(draw.booleans())))
    if pick(draw.booleans()):
        recipe = dataclasses.replace(
            recipe, warmup_epochs=pick(draw.floats(0.05, 1.5)),
            # Near the smallest of all numbers a product has no digits left.
            warmup_learning_rate=recipe.learning_rate * pick(
                draw.just(0.0) | draw.floats(1e-9, 1)))
    most = granularity * pick(draw.integers(batch // granularity, examples // granularity))
    limits = Limits(
        most, granularity if granularity != ghost else None, ghost,
        pick(draw.sampled_from((None, None, 1.1, 1.5, 3.0))))
    # What a run decides on its way is by hand in the end.
    name = pick(draw.sampled_from([one for one in schedule.STRATEGIES if one != "measured"]))
    by_hand = tuple((at, granularity * pick(draw.integers(1, most // granularity)))
                    for at in pick(marks))
    ramp = tuple((at, 2.0) for at in pick(marks)[:2]) if pick(draw.booleans()) else ()
    return recipe, Strategy(name, pick(draw.integers(0, 3)), by_hand, ramp), limits


def reference(recipe, strategy, example):
    """eta(e), stated again."""
    n = recipe.examples
    warm, last = round(recipe.warmup_epochs * n), round(recipe.epochs * n)
    if example < warm:
        start = recipe.warmup_learning_rate
        return start + (recipe.learning_rate - start) * example / warm
    if strategy.name == "constant":
        return recipe.learning_rate
    if recipe.curve == "steps":
        rate = recipe.learning_rate
        for epoch, factor in recipe.falls:
            rate /= factor if example >= round(epoch * n) else 1
        return rate
    x, low = (example - warm) / (last - warm), recipe.final_share
    over = max(0.0, (x - 1 + recipe.tail_share) / recipe.tail_share)
    tail = {"linear": 1 - over, "cosine": (1 + math.cos(math.pi * over)) / 2,
            "1-sqrt": 1 - math.sqrt(over)}
    return recipe.learning_rate * {
        "cosine": low + (1 - low) * (1 + math.cos(math.pi * x)) / 2,
        "linear": low + (1 - low) * (1 - x),
        "polynomial": low + (1 - low) * (1 - x) ** recipe.power,
        "exponential": math.exp(math.log(low) * x),
        "inverse_sqrt": (1 + x * (low**-2 - 1)) ** -0.5,
        "wsd": low + (1 - low) * tail[recipe.tail_shape],
    }[recipe.curve]


@settings(max_examples=200, deadline=None)
@given(plans())
def test_every_update_has_the_references_noise(plan):
    recipe, strategy, limits = plan
    try:
        phases = schedule.plan_phases(recipe, strategy, limits)
    except Mistake as refused:
        assert "\n" not in str(refused)
        assume(False)
    stated = schedule.stated(recipe, strategy.name)
    granularity = limits.granularity or limits.ghost_size
    example = 0
    for phase in phases:
        assert phase.start_example == example and phase.updates >= 1
        assert phase.batch_size % granularity == 0 and phase.batch_size <= limits.max_batch_size
        for start, end in schedule.spans([phase], 0):
            # Which itself refuses an update of another noise.
            rates = schedule.take_rates(stated, phases, phase, start, end)
            eta, kappa = reference(recipe, strategy, start), phase.batch_size / recipe.batch_size
            power, effective = POWERS[recipe.exchange], rates.learning_rate
            if recipe.accumulates:  # a step is eps/(1-m) times the gradient
                effective *= (1 - recipe.momentum) / (1 - phase.momentum)
            if power:
                assert effective ** (1 / power) / phase.batch_size == pytest.approx(
                    eta ** (1 / power) / recipe.batch_size, rel=1e-9)
            else:
                assert effective == pytest.approx(eta, rel=1e-9)
            kept = kappa if recipe.per_example.momentum else 1
            assert phase.momentum == pytest.approx(recipe.momentum**kept, rel=1e-12)
        example = phase.end_example
    assert 0 <= example - round(recipe.epochs * recipe.examples) < phases[-1].batch_size


@settings(max_examples=100, deadline=None)
@given(plans())
def test_a_batch_never_grows_past_what_the_reference_has_fallen(plan):
    recipe, strategy, limits = plan
    assume(strategy.name in ("increase", "hybrid"))
    try:
        phases = schedule.plan_phases(recipe, strategy, limits)
    except Mistake:
        assume(False)
    for before, phase in itertools.pairwise(phases):
        fallen = recipe.learning_rate / reference(recipe, strategy, phase.start_example)
        if phase.start_example >= round(recipe.warmup_epochs * recipe.examples):
            assert phase.batch_size <= recipe.batch_size * fallen * (1 + 1e-9)
        if not strategy.ramp and phase.batch_size > before.batch_size:
            smallest = limits.growth or (1 if recipe.curve == "steps" else 2)
            assert phase.batch_size >= before.batch_size * smallest * (1 - 1e-9)


def test_an_update_of_another_noise_stops_a_run():
    phase = schedule.plan_phases(COSINE, "increase", TO_5120)[2]
    right = COSINE, phase.learning_rate, phase.batch_size, phase.start_example
    schedule.check_noise(*right)
    for place, factor in ((1, 1 + 1e-8), (2, 2), (3, 1.001)):
        wrong = [value * factor if index == place else value for index, value in enumerate(right)]
        with pytest.raises(schedule.NoiseDiffers, match="report"):
            schedule.check_noise(*wrong[:3], round(wrong[3]))


def test_the_rates_that_an_update_takes_are_checked(monkeypatch):
    """A rate that is wrong in one place is not taken, whatever made it."""
    phases = schedule.plan_phases(COSINE, "increase", TO_5120)
    update = phases[1], phases[1].start_example, phases[1].start_example + phases[1].batch_size
    assert schedule.take_rates(COSINE, phases, *update).learning_rate == phases[1].learning_rate
    monkeypatch.setattr(rates, "_made_up", lambda recipe, batch_size: 1.001)
    with pytest.raises(schedule.NoiseDiffers, match="report"):
        schedule.take_rates(COSINE, phases, *update)


# --- what is known of it --------------------------------------------------------------------------
def test_seesaws_cuts_are_the_square_root_exchange():
    """A cut of the rate by a: the rate by sqrt(a), the batch by a (arXiv 2510.14717)."""
    recipe = dataclasses.replace(
        CIFAR, falls=((60, 4), (120, 4)), exchange="sqrt", accumulates=False)
    phases = schedule.plan_phases(recipe, "increase", Limits(ghost_size=128))
    assert [(phase.batch_size, phase.learning_rate) for phase in phases] == [
        (128, 0.1), (512, pytest.approx(0.05)), (2048, pytest.approx(0.025))]
    assert [phase.name for phase in phases] == ["noise/1", "noise/16", "noise/256"]
    assert schedule.noise(recipe, 0.05, 512) == pytest.approx(1 / 16)


def test_growths_are_at_least_by_the_factor_and_prefer_whole_first_batches():
    def first(count, growth, batch=128, ghost=32):
        recipe = dataclasses.replace(CIFAR, batch_size=batch)
        return [batch, *itertools.islice(
            batches.growths(recipe, Limits(growth=growth), ghost), count)]

    assert first(5, None) == [128, 256, 512, 1024, 2048, 4096]
    assert first(5, 1.5) == [128, 256, 384, 640, 1024, 1536]
    assert first(4, 1.25) == [128, 160, 224, 288, 384]  # no whole batch lies near 160, 224 and 288
    assert first(3, 2.0, 96) == [96, 192, 384, 768]


def test_cosine_by_hand():
    """A cosine to zero is at half of its peak after half of the run, at 1/4 after 2/3."""
    phases = schedule.plan_phases(COSINE, "increase", TO_5120)
    assert [phase.batch_size for phase in phases] == [128, 256, 512, 1024, 2048, 4096]
    assert phases[1].start_example == 5_120_000
    assert phases[2].nominal_end_example == math.ceil(10_240_000 * math.acos(-0.75) / math.pi)
    assert phases[1].nominal_end_example == 6_826_667
    assert (phases[1].learning_rate, phases[1].learning_rate_end) == (
        0.1, pytest.approx(0.05, rel=1e-6))
    hybrid = schedule.plan_phases(COSINE, "hybrid", TO_5120, hybrid_falls=2)
    assert [phase.batch_size for phase in hybrid] == [128, 256, 512]


def test_the_tail_of_wsd_begins_a_phase_whatever_the_strategy():
    recipe = dataclasses.replace(CIFAR, curve="wsd", tail_share=0.25)
    for strategy in ("decay", "increase"):
        first, tail, *_ = schedule.plan_phases(recipe, strategy, TO_5120)
        assert (first.name, tail.name) == ("noise/1", "tail")
        assert tail.start_example == 7_680_000
        assert first.learning_rate == first.learning_rate_end == tail.learning_rate == 0.1


def test_a_ramp_and_a_warm_up_overlap():
    recipe = dataclasses.replace(COSINE, batch_size=512, warmup_epochs=5)
    ramp = Strategy("increase", ramp=((2, 2), (8, 2)))
    phases = schedule.plan_phases(recipe, ramp, TO_5120)
    assert [(phase.name, phase.batch_size) for phase in phases[:5]] == [
        ("warmup+ramp/4", 128), ("warmup+ramp/2", 256), ("noise/1+ramp/2", 256),
        ("noise/1", 512), ("noise/2", 1024)]
    # At epoch 1 the reference's rate is 0.02; a quarter of its batch has a quarter of it.
    assert schedule.rates_at(recipe, 128, 50_000).learning_rate == pytest.approx(0.005)


def test_a_fall_just_before_a_batch_by_hand_waits_for_the_update_that_ends_there():
    """As where a run is continued with another batch from the end of one of its phases on."""
    stated = schedule.Recipe(0.1, 48, 0.9, 1000, 3, falls=((1, 2),))
    end = schedule.plan_phases(stated, "decay", schedule.Limits())[0].end_example
    assert end == 1008
    by_hand = Strategy("by_hand", by_hand=((1.008, 96),))
    first, second = schedule.plan_phases(stated, by_hand, schedule.Limits())
    assert (first.end_example, second.batch_size) == (1008, 96)
    assert second.learning_rate == pytest.approx(0.1 / 2 * 2)
    with pytest.raises(Mistake, match="'epoch/1.001' would have no update"):
        schedule.plan_phases(
            stated, Strategy("by_hand", by_hand=((1.001, 96), (1.008, 96))), schedule.Limits())


def test_batches_by_hand_split_phases_where_they_begin():
    by_hand = Strategy("by_hand", by_hand=((30, 256), (60, 1024), (200, 128)))
    phases = schedule.plan_phases(CIFAR, by_hand, TO_5120)
    assert [(phase.name, phase.batch_size) for phase in phases] == [
        ("noise/1", 128), ("epoch/30", 256), ("noise/5", 1024), ("noise/25", 1024),
        ("noise/125", 1024), ("epoch/200", 128)]
    assert [phase.learning_rate for phase in phases] == pytest.approx(
        [0.1, 0.2, 0.16, 0.032, 0.0064, 0.0008], rel=1e-12)


@pytest.mark.parametrize(("settings", "share"), (
    # Closed forms of 1 - mean(eta/peak).
    ({}, 1 - (60 + 60 / 5 + 40 / 25 + 44.8 / 125) / 204.8),
    ({"curve": "cosine"}, 0.5),
    ({"curve": "cosine", "final_share": 0.1}, 0.45),
    ({"curve": "linear"}, 0.5),
    ({"curve": "polynomial", "power": 2.0}, 2 / 3),
    ({"curve": "wsd"}, 0.1),
    ({"curve": "wsd", "tail_shape": "1-sqrt"}, 0.2 * 2 / 3),
    ({"curve": "exponential", "final_share": 0.01}, 1 - 0.99 / math.log(100)),
    ({"curve": lambda x: math.cos(math.pi / 2 * x)}, 1 - 2 / math.pi),
))
def test_the_ceiling_of_a_curve(settings, share):
    recipe = dataclasses.replace(CIFAR, **settings)
    assert schedule.ceiling(recipe) == pytest.approx(share, abs=1e-5)
    # Fine growths and no limit come near it; the last batches are large, so the set is too.
    large = dataclasses.replace(recipe, examples=50_000_000, epochs=204.8)
    phases = schedule.plan_phases(large, "increase", Limits(1_000_000, 1, 1, 1.02))
    made = sum(phase.updates for phase in phases)
    assert 1 - made * 128 / (204.8 * 50_000_000) == pytest.approx(share, abs=0.01)
    # A warm-up is not saved on.
    warm = dataclasses.replace(recipe, warmup_epochs=20.48)
    if recipe.curve != "steps":
        assert schedule.ceiling(warm) == pytest.approx(0.9 * share, abs=1e-4)


def test_notes_on_a_smooth_curve_name_growth_and_what_the_rate_does_alone():
    phases = schedule.plan_phases(COSINE, "increase", TO_5120)
    cost, alone, *_ = schedule.notes(COSINE, phases, "increase", limits=TO_5120)
    more = sum(phase.updates for phase in phases) - 40_000
    assert "would take 40000 updates" in cost and f"costs {more} more" in cost
    assert "limits.growth" in cost
    assert "from epoch 181.65 on" in alone and "the rate alone falls" in alone
    assert schedule.notes(COSINE, schedule.plan_phases(COSINE, "decay", TO_5120), "decay") == []


# --- per example ----------------------------------------------------------------------------------
ADAM = dataclasses.replace(
    COSINE, exchange="sqrt", accumulates=False, beta2=0.999, weight_decay=0.1, average=0.9999,
    per_example=PerExample(momentum=True))


def test_what_is_kept_per_example_is_the_references_after_every_update():
    phases = schedule.plan_phases(ADAM, Strategy("increase", ramp=()), TO_5120)
    left = {key: [] for key in ("momentum", "beta2", "average")}  # logarithms
    for start, end in schedule.spans(phases, 0):
        phase = schedule.phase_at(phases, start)
        rates = schedule.take_rates(ADAM, phases, phase, start, end)
        for key, logarithms in left.items():
            logarithms.append(math.log(getattr(rates, key)))
            if end == phase.end_example:
                assert math.fsum(logarithms) == pytest.approx(
                    math.log(getattr(ADAM, key)) * end / 128, rel=1e-12)
        # Of a weight, an update takes rate x decay.
        assert rates.learning_rate * rates.weight_decay / (end - start) == pytest.approx(
            schedule.reference_rate(ADAM, start) * 0.1 / 128, rel=1e-12)


def test_each_can_be_switched_off():
    for key, name in (("momentum", "momentum"), ("beta2", "beta2"), ("average", "average"),
                      ("weight_decay", "weight_decay")):
        off = dataclasses.replace(
            ADAM, per_example=dataclasses.replace(ADAM.per_example, **{key: False}))
        one, other = (schedule.rates_at(recipe, 1024, 6_000_000) for recipe in (ADAM, off))
        for field in one._fields:
            same = getattr(one, field) == getattr(other, field)
            of = "momentum" if field == "look_ahead" else field
            assert same == (of != name), field
        assert getattr(other, name) == getattr(ADAM, name)


def test_an_accumulator_is_carried_over_to_a_new_momentum():
    """A constant gradient of 1 fills it to 1/(1-m), before a change of the batch and after."""
    recipe = dataclasses.replace(COSINE, per_example=PerExample(momentum=True))
    phases = schedule.plan_phases(recipe, "increase", TO_5120)
    accumulator = 0.0
    for start, end in schedule.spans(phases, 0):
        phase = schedule.phase_at(phases, start)
        accumulator = 1 + accumulator * schedule.take_rates(
            recipe, phases, phase, start, end).momentum
        if start > 100_000:
            assert accumulator == pytest.approx(1 / (1 - phase.momentum), rel=1e-9)


def test_scale_up_follows_the_exchange_and_keeps_what_is_per_example():
    scaled = schedule.scale_up(ADAM, 2.0, granularity=128)
    assert (scaled.batch_size, scaled.learning_rate) == (512, 0.2)
    assert scaled.beta2 == 0.999**4 and scaled.average == 0.9999**4
    assert scaled.momentum == 0.9**4
    assert scaled.weight_decay * 0.2 / 512 == pytest.approx(0.1 * 0.1 / 128)
    # A raised momentum makes steps longer, and leaves the rate's part of the decay.
    sgd = dataclasses.replace(COSINE, weight_decay=0.1)
    scaled = schedule.scale_up(sgd, 5.0, momentum=0.98, granularity=128)
    assert scaled.batch_size == 25 * sgd.batch_size
    assert scaled.weight_decay * scaled.learning_rate / scaled.batch_size == pytest.approx(
        sgd.weight_decay * sgd.learning_rate / sgd.batch_size)
    with pytest.raises(Mistake, match="'none' leaves the rate alone"):
        schedule.scale_up(dataclasses.replace(ADAM, exchange="none"), 2.0)


# --- refused --------------------------------------------------------------------------------------
def rises(x):
    return 1 - x if x < 0.5 else x


REFUSED = {
    "an unknown curve": ({"curve": "cosin"}, "increase", {}, ("'cosin'", "cosine", "dotted path")),
    "a curve that rises again": (
        {"curve": rises}, "increase", {}, ("'rises'", "rises again", "decay or by_hand")),
    "shares over 1": ({"curve": lambda x: 2 - x}, "decay", {}, ("is 2", "from 0 to 1")),
    "a peak below 1": ({"curve": lambda x: 0.1 * (1 - x)}, "decay", {}, ("0.1", "must be 1")),
    "no number": ({"curve": lambda x: "1"}, "decay", {}, ("'1'", "numbers from 0 to 1")),
    "growth past the set": (
        {"curve": "cosine"}, "increase", {"max_batch_size": None},
        ("past the 50000", "limits.max_batch_size")),
    "a tail of length 0": ({"curve": "wsd", "tail_share": 0.0}, "decay", {}, ("tail_share is 0",)),
    "a tail over the run": ({"curve": "wsd", "tail_share": 1.5}, "decay", {}, ("1.5", "at most 1")),
    "a tail of no shape": (
        {"curve": "wsd", "tail_shape": "sqrt"}, "decay", {}, ("'sqrt'", "1-sqrt")),
    "an exponential to zero": (
        {"curve": "exponential"}, "decay", {}, ("final_share is 0", "1e-09 or more")),
    "a final share of 1": (
        {"curve": "cosine", "final_share": 1.0}, "decay", {}, ("final_share is 1", "below 1")),
    "a power of 0": ({"curve": "polynomial", "power": 0.0}, "decay", {}, ("recipe.power is 0",)),
    "an exchange": ({"exchange": "square"}, "decay", {}, ("'square'", "linear, sqrt, none")),
    "a growth of 1": (
        {"curve": "cosine"}, "increase", {"growth": 1.0}, ("limits.growth is 1", "1.01 or more")),
    "a growth below 1": ({}, "increase", {"growth": 0.5}, ("limits.growth is 0.5",)),
    "beta2 under its floor": (
        {"per_example": PerExample(beta2_floor=0.9), "accumulates": False}, "increase",
        {"max_batch_size": None}, ("beta2 falls to 0.882", "beta2_floor of 0.9", "noise/125")),
    "momentum under its floor": (
        {"per_example": PerExample(momentum=True, momentum_floor=0.5)}, "increase", {},
        ("momentum falls to 0.0718", "momentum_floor of 0.5")),
    "by hand without batches": ({}, Strategy("by_hand"), {}, ("by_hand is ()", "(epoch, batch)")),
    "by hand off the granularity": (
        {}, Strategy("by_hand", by_hand=((30, 200),)), {}, ("200", "epoch 30", "multiple of 128")),
    "by hand over the limit": (
        {}, Strategy("by_hand", by_hand=((30, 6400),)), {}, ("6400", "at most 5120")),
    "by hand out of order": (
        {}, Strategy("by_hand", by_hand=((30, 256), (20, 512))), {}, ("[30, 20]", "20 does not")),
    "by hand no pairs": (
        {}, Strategy("by_hand", by_hand=((30, "256"),)), {}, ("by_hand is", "(epoch, batch)")),
    "by hand not a number": (
        {}, Strategy("by_hand", by_hand=((30, math.nan),)), {}, ("nan", "multiple of 128")),
    "a ramp to a part of a ghost batch": (
        {}, Strategy("increase", ramp=((2, 2),)), {}, ("divides the batch of 128 by 2", "64")),
    "a ramp downwards": (
        {}, Strategy("increase", ramp=((2, 0.5),)), {}, ("factor of 0.5", "over 1")),
    "a ramp past the end": ({}, Strategy("increase", ramp=((300, 2),)), {}, ("[300] of 204.8",)),
    "falls that are none": ({"falls": ((60,),)}, "decay", {}, ("((60,),)", "(epoch, factor)")),
    "falls of texts": ({"falls": (("60", "5"),)}, "decay", {}, ("'60'", "(epoch, factor)")),
    "falls no list": ({"falls": 5}, "decay", {}, ("recipe.falls is 5",)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_schedule_is_refused_with_value_and_remedy(name):
    settings, strategy, limits, parts = REFUSED[name]
    with pytest.raises(Mistake) as refused:
        schedule.plan_phases(dataclasses.replace(CIFAR, **settings), strategy,
                             dataclasses.replace(TO_5120, **limits))
    for part in parts:
        assert part in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("settings", (
    {"curve": "cosine", "warmup_epochs": 204.799999}, {"epochs": 1e300, "falls": ()},
    {"curve": "inverse_sqrt", "final_share": 1e-200},
))
def test_numbers_without_a_schedule_are_told_too(settings):
    with pytest.raises(Mistake):
        schedule.plan_phases(dataclasses.replace(CIFAR, **settings), "increase", TO_5120)


def test_what_a_function_returns_may_be_any_number():
    for kind in (np.float32, np.float64, jnp.float32, float):
        recipe = dataclasses.replace(CIFAR, curve=lambda x, kind=kind: kind(1 - x))
        assert [phase.batch_size for phase in schedule.plan_phases(
            recipe, "increase", TO_5120)] == [128, 256, 512, 1024, 2048, 4096]


def test_a_rise_to_the_peak_is_not_saved_on():
    """A curve with a warm-up of its own, and one that only rises."""
    recipe = dataclasses.replace(CIFAR, curve=lambda x: min(10 * x, (1 - x) / 0.9))
    assert schedule.ceiling(recipe) == pytest.approx(0.45, abs=1e-3)
    first, second, *_ = schedule.plan_phases(recipe, "increase", TO_5120)
    assert second.start_example / 10_240_000 == pytest.approx(0.55, abs=1e-3)
    assert schedule.ceiling(dataclasses.replace(CIFAR, curve=lambda x: x)) < 1e-3


def test_a_short_run_has_the_ceiling_of_a_long_one():
    for examples, epochs in ((1437, 1), (100, 3)):
        recipe = dataclasses.replace(COSINE, examples=examples, epochs=epochs, batch_size=1)
        assert schedule.ceiling(recipe) == pytest.approx(0.5, abs=0.01)


def test_a_library_s_adam_is_the_programs():
    """By default its betas are kept per example, down to a floor, also when it is scaled up."""
    adam = dataclasses.replace(ADAM, per_example=PerExample(), beta2=0.99)
    rates = schedule.rates_at(adam, 512, 0)
    assert (rates.momentum, rates.beta2) == (0.9**4, 0.99**4)
    sgd = schedule.rates_at(COSINE, 512, 0)  # which has no second beta, and so no floor for one
    assert (sgd.momentum, sgd.beta2) == (0.9, COSINE.beta2)
    with pytest.raises(Mistake, match="beta2 falls to 0.815 in phase"):
        schedule.plan_phases(dataclasses.replace(adam, beta2=0.95), "increase", Limits(1024, 128))
    with pytest.raises(Mistake, match="beta2 falls to 0.815 scaled up to a batch of 512"):
        schedule.scale_up(dataclasses.replace(adam, beta2=0.95), 2.0)


def test_a_rise_is_told_as_large_as_it_is():
    recipe = dataclasses.replace(CIFAR, curve=lambda x: 0.5 + 0.5 * math.cos(6 * math.pi * x))
    with pytest.raises(Mistake, match="rises again by 1 of its peak after"):
        schedule.plan_phases(recipe, "increase", TO_5120)
