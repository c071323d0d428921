"""Phases: the paper's counts and rates, what holds for every recipe, and what is refused.

The numbers are the paper's, or arithmetic on its settings; none come from the code.
"""

import dataclasses
import random
from fractions import Fraction

import pytest

from bigbatch import schedule
from bigbatch.schedule import Limits, Recipe, due

CIFAR = Recipe(
    learning_rate=0.1, batch_size=128, momentum=0.9, examples=50_000, epochs=204.8,
    falls=((60, 5), (120, 5), (160, 5)),
)
IMAGENET = Recipe(
    learning_rate=3.0, batch_size=8192, momentum=0.9, examples=1_281_167, epochs=90,
    falls=((30, 10), (60, 10), (80, 10)),
)
GOYAL = dataclasses.replace(
    IMAGENET, learning_rate=3.2, warmup_epochs=5, warmup_learning_rate=0.1
)
GHOST_128 = Limits(ghost_size=128)
TO_5120 = Limits(max_batch_size=5120, ghost_size=128)
TO_16384 = Limits(max_batch_size=16_384, ghost_size=32)
TO_65536 = Limits(max_batch_size=65_536, ghost_size=64)


def scaled(recipe, granularity, rate=1.0, momentum=None):
    return schedule.scale_up(recipe, rate, momentum, granularity)


# name: (recipe, strategy, limits, updates, batches, learning rates); a warm-up left out of both.
CURVES = {
    "figure 1, decaying": (
        CIFAR, "decay", GHOST_128, 80_000, (128, 128, 128, 128), (0.1, 0.02, 0.004, 0.0008)),
    "figure 1, hybrid": (
        CIFAR, "hybrid", GHOST_128, 34_750, (128, 640, 640, 640), (0.1, 0.1, 0.02, 0.004)),
    "figure 1, increasing": (
        CIFAR, "increase", GHOST_128, 28_891, (128, 640, 3200, 16_000), (0.1, 0.1, 0.1, 0.1)),
    "figure 5, increasing batch size": (
        CIFAR, "increase", TO_5120, 29_189, (128, 640, 3200, 5120), (0.1, 0.1, 0.1, 0.032)),
    "figure 5, increased initial learning rate": (
        scaled(CIFAR, 128, 5.0), "increase", TO_5120, 6453, (640, 3200, 5120, 5120),
        (0.5, 0.5, 0.16, 0.032)),
    "figure 5, increased momentum coefficient": (
        scaled(CIFAR, 128, 5.0, 0.98), "increase", TO_5120, 2352, (3200, 5120, 5120, 5120),
        (0.5, 0.16, 0.032, 0.0064)),
    "figure 6, decaying": (
        IMAGENET, "decay", Limits(ghost_size=32), 14_075, (8192,) * 4, (3.0, 0.3, 0.03, 0.003)),
    "figure 6, increasing": (
        IMAGENET, "hybrid", Limits(ghost_size=32), 5630, (8192, 81_920, 81_920, 81_920),
        (3.0, 3.0, 0.3, 0.03)),
    "figure 7, momentum 0.9": (
        IMAGENET, "increase", TO_65536, 5865, (8192, 65_536, 65_536, 65_536),
        (3.0, 3.0 / 1.25, 0.24, 0.024)),
    "figure 7, momentum 0.95": (
        scaled(IMAGENET, 64, momentum=0.95), "increase", TO_65536, 3519,
        (16_384, 65_536, 65_536, 65_536), (3.0, 3.0 / 2.5, 0.12, 0.012)),
    "figure 7, momentum 0.975": (
        scaled(IMAGENET, 64, momentum=0.975), "increase", TO_65536, 2346,
        (32_768, 65_536, 65_536, 65_536), (3.0, 3.0 / 5, 0.06, 0.006)),
    # 90 epochs at 8192 are 14 074.5 updates; 30 of them are 4 691.5, and 60 at 16 384 as many.
    "ResNet-50 (a)": (
        GOYAL, "decay", Limits(ghost_size=32), 14_075, (8192,) * 4, (3.2, 0.32, 0.032, 0.0032)),
    "ResNet-50 (b)": (
        GOYAL, "increase", TO_16384, 2 * 4692, (8192, 16_384, 16_384, 16_384),
        (3.2, 0.64, 0.064, 0.0064)),
    "ResNet-50 (c)": (
        scaled(GOYAL, 32, 2.0), "increase", TO_16384, 7037, (16_384,) * 4,
        (6.4, 0.64, 0.064, 0.0064)),
}


@pytest.mark.parametrize("name", CURVES)
def test_every_curve_has_the_papers_updates_batches_and_rates(name):
    recipe, strategy, limits, updates, batches, rates = CURVES[name]
    phases = schedule.plan_phases(recipe, strategy, limits)
    assert abs(sum(phase.updates for phase in phases) - updates) <= 2
    if recipe.warmup_epochs:
        warmup, *phases = phases
        assert (warmup.name, warmup.batch_size, warmup.learning_rate_end) == (
            "warmup", batches[0], rates[0])
    assert tuple(phase.batch_size for phase in phases) == batches
    assert [phase.learning_rate for phase in phases] == pytest.approx(rates, rel=1e-12)
    assert all(phase.learning_rate_end == phase.learning_rate for phase in phases)
    factor = 5 if recipe.examples == 50_000 else 10
    assert [phase.name for phase in phases] == [f"noise/{factor**place}" for place in range(4)]


def test_a_warm_up_rises_by_the_example_from_an_absolute_rate():
    for recipe, top in ((GOYAL, 3.2), (scaled(GOYAL, 32, 2.0), 6.4)):
        warmup, first, *_ = schedule.plan_phases(recipe, "increase", TO_16384)
        nominal = 5 * 1_281_167
        assert warmup.nominal_end_example == nominal
        assert warmup.learning_rate == 0.1
        for update in (0, 1, 100, warmup.updates - 1):
            example = update * warmup.batch_size
            assert schedule.reference_rate(recipe, example) == pytest.approx(
                0.1 + (top - 0.1) * example / nominal, rel=1e-12)
        # The last update of a warm-up still begins before its end, so no rate is past the top.
        assert warmup.end_example - warmup.batch_size < nominal <= warmup.end_example
        assert first.learning_rate == schedule.reference_rate(recipe, nominal) == top


def test_noise_scales_and_lost_epochs_by_hand():
    first, *_, last = schedule.plan_phases(CIFAR, "increase", GHOST_128)
    # 0.1 / (1 - 0.9) x (50 000 / 128 - 1), and with 16 000 for 128.
    assert first.noise_scale == pytest.approx(389.625)
    assert first.noise_scale_approximate == pytest.approx(390.625)
    assert last.noise_scale == pytest.approx(2.125)
    assert last.noise_scale_approximate == pytest.approx(3.125)
    # B / (N (1 - m)), the values derived from the paper's appendix A.
    for examples, batch, momentum, epochs in (
        (50_000, 128, 0.9, 0.0256), (50_000, 3200, 0.98, 3.2), (50_000, 5120, 0.98, 5.12),
        (1_281_167, 8192, 0.9, 0.064), (1_281_167, 16_384, 0.95, 0.256),
        (1_281_167, 32_768, 0.975, 1.02), (1_281_167, 65_536, 0.975, 2.05),
    ):
        recipe = Recipe(0.1, batch, momentum, examples, epochs=10)
        (phase,) = schedule.plan_phases(recipe, "constant", Limits())
        assert phase.lost_epochs == pytest.approx(epochs, rel=5e-3)


def random_recipes(count=400):
    """(recipe, limits, falls paid by batch under "hybrid"), with a seed."""
    draw = random.Random(1711)
    for _ in range(count):
        ghost = draw.choice((1, 4, 8, 16))
        granularity = ghost * draw.choice((1, 1, 2, 3))
        batch = granularity * draw.randint(1, 4)
        examples = batch * draw.randint(30, 300) + draw.randint(0, 50)
        places = sorted(draw.sample(range(200, 1000), draw.randint(0, 4)))
        factors = [draw.choice((2, 3, 5, 10, draw.randint(101, 1200) / 100)) for _ in places]
        biggest = granularity * draw.randint(batch // granularity, examples // granularity)
        recipe = Recipe(
            learning_rate=10 ** draw.uniform(-4, 1), batch_size=batch,
            momentum=draw.choice((0.0, 0.5, 0.9, 0.98)), examples=examples, epochs=12.34,
            falls=tuple((place / 100, factor) for place, factor in zip(places, factors,
                                                                       strict=True)),
        )
        if draw.random() < 0.3:
            recipe = dataclasses.replace(
                recipe, warmup_epochs=draw.uniform(0.1, 1.9),
                warmup_learning_rate=recipe.learning_rate * draw.random())
        limits = Limits(biggest, granularity if granularity != ghost else None, ghost)
        yield recipe, limits, draw.randint(0, len(places))


def plans():
    """(recipe, limits, hybrid_falls, strategy, phases) of all random recipes that have a plan."""
    refused = planned = 0
    for recipe, limits, hybrid_falls in random_recipes():
        for strategy in ("decay", "hybrid", "increase"):
            try:
                phases = schedule.plan_phases(recipe, strategy, limits, hybrid_falls)
            except ValueError as error:
                assert "no update" in str(error)
                refused += 1
                continue
            planned += 1
            yield recipe, limits, hybrid_falls, strategy, phases
    assert planned > 10 * refused, "most random recipes should have a plan"


def test_phases_tile_the_run_with_whole_updates_and_end_at_the_first_boundary():
    for recipe, _, _, _, phases in plans():
        epochs = [recipe.warmup_epochs] if recipe.warmup_epochs else []
        epochs += [epoch for epoch, _ in recipe.falls] + [recipe.epochs]
        example = update = 0
        for place, (phase, epoch) in enumerate(zip(phases, epochs, strict=True)):
            assert (phase.index, phase.start_example, phase.start_update) == (
                place, example, update)
            assert phase.updates >= 1
            example, update = example + phase.updates * phase.batch_size, update + phase.updates
            assert phase.end_example == example
            nominal = round(epoch * recipe.examples)
            assert phase.nominal_end_example == nominal
            assert example - phase.batch_size < nominal <= example
            assert phase.shift == example - nominal
            assert schedule.phase_at(phases, phase.start_example) is phase
            assert schedule.phase_at(phases, phase.end_example - 1) is phase
        assert schedule.phase_at(phases, example) is None


def test_batch_takes_what_it_can_of_a_fall_and_the_rate_pays_the_rest():
    for recipe, limits, hybrid_falls, strategy, phases in plans():
        by_batch = {"decay": 0, "hybrid": hybrid_falls, "increase": len(recipe.falls)}[strategy]
        granularity = limits.granularity or limits.ghost_size
        after_warmup = phases[bool(recipe.warmup_epochs):]
        wanted = Fraction(recipe.batch_size)
        for place, (_, factor) in enumerate(recipe.falls):
            before, after = after_warmup[place : place + 2]
            grown = before.batch_size
            if place < by_batch:
                wanted *= Fraction(str(factor))  # the decimal that was written
                grown = min(wanted // granularity * granularity, limits.max_batch_size)
            assert after.batch_size == grown
            paid = after.batch_size / before.batch_size * (
                before.learning_rate_end / after.learning_rate)
            assert paid == pytest.approx(factor, rel=1e-12)
        assert all(phase.batch_size % granularity == 0 for phase in phases)
        assert all(phase.momentum == recipe.momentum for phase in phases)


def nominal_noise(recipe, example):
    """The approximate noise scale asked for at `example`, in a run without update boundaries."""
    rate = recipe.learning_rate
    warmup = round(recipe.warmup_epochs * recipe.examples)
    if example < warmup:
        start = recipe.warmup_learning_rate
        rate = start + (rate - start) * example / warmup
    noise = rate * recipe.examples / (recipe.batch_size * (1 - recipe.momentum))
    for epoch, factor in recipe.falls:
        if example >= round(epoch * recipe.examples):
            noise /= factor
    return noise


def test_all_strategies_share_one_nominal_noise_curve():
    draw = random.Random(489)
    straddling = 0
    for recipe, _, _, _, phases in plans():
        falls = [round(epoch * recipe.examples) for epoch, _ in recipe.falls]
        for phase in phases:
            assert phase.noise_scale == pytest.approx(
                phase.noise_scale_approximate * (1 - phase.batch_size / recipe.examples), rel=1e-9)
            # The first and the last update and some between, at one of their examples each.
            for update in {0, phase.updates - 1, *(draw.randrange(phase.updates) for _ in "abc")}:
                start = phase.start_example + update * phase.batch_size
                rate = schedule.take_rates(
                    recipe, phases, phase, start, start + phase.batch_size).learning_rate
                noise = rate * recipe.examples / (phase.batch_size * (1 - phase.momentum))
                assert noise == pytest.approx(nominal_noise(recipe, start), rel=1e-9)
                inside = start + draw.randrange(phase.batch_size)
                if recipe.warmup_epochs and phase.index == 0:
                    continue  # the rate rises inside an update too
                if any(start < fall <= inside for fall in falls):
                    straddling += 1
                else:
                    assert noise == pytest.approx(nominal_noise(recipe, inside), rel=1e-9)
    assert straddling, "no update was looked at past the fall that it straddles"


def test_the_noise_that_a_recipe_states_is_the_nominal_one():
    for recipe, _, _ in random_recipes(50):
        peak = recipe.learning_rate * recipe.examples / (
            recipe.batch_size * (1 - recipe.momentum))
        for epoch in (0.0, 0.05, 1.0, 3.33, 12.0, *(epoch for epoch, _ in recipe.falls)):
            example = round(epoch * recipe.examples)
            assert schedule.stated_noise(recipe, example) * peak == pytest.approx(
                nominal_noise(recipe, example), rel=1e-12)


def test_a_larger_batch_never_needs_more_updates():
    counts = {}
    for recipe, _, hybrid_falls, strategy, phases in plans():
        counts.setdefault((recipe, hybrid_falls), {})[strategy] = sum(
            phase.updates for phase in phases)
    for by_strategy in counts.values():
        if len(by_strategy) == 3:
            assert by_strategy["increase"] <= by_strategy["hybrid"] <= by_strategy["decay"]


def plan(strategy="increase", limits=GHOST_128, hybrid_falls=1, **changes):
    return schedule.plan_phases(
        dataclasses.replace(CIFAR, **changes), strategy, limits, hybrid_falls)


def paths(phases):
    return [phase.batch_size for phase in phases], [phase.learning_rate for phase in phases]


def test_constant_ignores_the_falls():
    (phase,) = plan("constant")
    assert (phase.name, phase.updates, phase.learning_rate) == ("noise/1", 80_000, 0.1)
    assert len(plan("constant", epochs=2)) == 1


def test_hybrid_lies_between_decay_and_increase():
    assert plan("hybrid", hybrid_falls=0) == plan("decay")
    assert plan("hybrid", hybrid_falls=3) == plan("increase")
    assert paths(plan("hybrid", hybrid_falls=2))[0] == [128, 640, 3200, 3200]


def test_growth_that_does_not_reach_the_next_multiple_is_paid_by_the_rate():
    batches, rates = paths(plan(falls=((60, 1.9), (120, 1.9), (160, 2))))
    assert batches == [128, 128, 384, 896]  # 243, 462 and 924 without rounding
    assert rates == pytest.approx(
        [0.1, 0.1 / 1.9, 0.1 * 3 / 1.9**2, 0.1 * 7 / (2 * 1.9**2)], rel=1e-12)


def test_growth_is_rounded_down_to_the_users_own_granularity():
    batches, rates = paths(plan(
        limits=Limits(granularity=384, ghost_size=128), batch_size=384, falls=((60, 2.5),)))
    assert batches == [384, 768]  # 960 is two and a half
    assert rates == pytest.approx([0.1, 0.1 * 2 / 2.5], rel=1e-12)


def test_growth_meant_as_a_decimal_loses_nothing_to_binary():
    assert 100 * 4.35 < 435  # the double next to 4.35 is below it
    batches, _ = paths(plan(limits=Limits(), batch_size=100, falls=((60, 4.35),)))
    assert batches == [100, 435]


def test_a_limit_that_is_met_or_left_at_the_first_batch():
    assert paths(plan(limits=Limits(3200, None, 128))) == (
        [128, 640, 3200, 3200], pytest.approx([0.1, 0.1, 0.1, 0.02]))
    assert paths(plan(limits=Limits(128, None, 128))) == paths(plan("decay"))


def test_a_whole_training_set_is_a_batch_without_exact_noise():
    (phase,) = plan("constant", Limits(), batch_size=1000, examples=1000, epochs=2)
    assert (phase.updates, phase.noise_scale) == (2, 0)
    assert phase.noise_scale_approximate == pytest.approx(1.0)


def test_scale_up_keeps_the_noise_and_the_warm_ups_start():
    recipe = scaled(GOYAL, 32, 2.0, 0.95)
    assert (recipe.learning_rate, recipe.batch_size, recipe.momentum) == (6.4, 32_768, 0.95)
    assert recipe.warmup_learning_rate == 0.1
    for one, other in zip(schedule.plan_phases(recipe, "decay", TO_65536),
                          schedule.plan_phases(GOYAL, "decay", TO_65536), strict=True):
        if one.name != "warmup":
            assert one.noise_scale_approximate == pytest.approx(
                other.noise_scale_approximate, rel=1e-12)
    # 16 is no multiple of 128, but 8 x 16 is.
    assert scaled(dataclasses.replace(CIFAR, batch_size=16), 128, 8.0).batch_size == 128
    assert scaled(CIFAR, 128) == CIFAR


def test_notes_say_where_exact_and_approximate_noise_part():
    # 5120 of 50 000 is 10.24 %: g_exact / g_approximate = 1 - B/N.
    *_, last = schedule.notes(CIFAR, plan(limits=TO_5120), "increase")
    for part in ("noise/125", "5120", "50000", "10.2%"):
        assert part in last
    assert schedule.notes(CIFAR, plan("hybrid"), "hybrid") == []


SMALL_FALLS = dataclasses.replace(
    CIFAR, falls=tuple((20.0 * (1 + index), 1.5) for index in range(8)))


def test_falls_too_small_for_one_ghost_batch_more_are_made_up_for():
    """Each batch is the first one times the whole growth so far, rounded down to ghost batches."""
    phases = schedule.plan_phases(SMALL_FALLS, "increase", GHOST_128)
    assert [phase.batch_size for phase in phases] == [
        int(128 * 1.5**index / 128) * 128 for index in range(9)
    ] == [128, 128, 256, 384, 640, 896, 1408, 2176, 3200]
    assert sum(phase.updates for phase in phases) == 26_685
    for index, phase in enumerate(phases):
        assert phase.noise_scale_approximate == pytest.approx(
            phases[0].noise_scale_approximate / 1.5**index, rel=1e-12)


def test_notes_say_what_rounding_and_limits_cost():
    phases = schedule.plan_phases(SMALL_FALLS, "increase", GHOST_128)
    exact = 50_000 / 128 * (sum(20 / 1.5**index for index in range(8)) + 44.8 / 1.5**8)
    assert schedule.exact_updates(SMALL_FALLS, "increase") == pytest.approx(exact, rel=1e-12)
    made = sum(phase.updates for phase in phases)
    (note,) = schedule.notes(SMALL_FALLS, phases, "increase")
    assert f"would take {exact:.0f} updates" in note and f"costs {made - exact:.0f} more" in note
    capped, *_ = schedule.notes(CIFAR, plan(limits=TO_5120), "increase")
    # 44.8 epochs of batches of 5120 in the place of 16 000; each phase ends on a whole update.
    more = round(sum(phase.updates for phase in plan(limits=TO_5120))
                 - schedule.exact_updates(CIFAR, "increase"))
    assert abs(more - 44.8 * 50_000 * (1 / 5120 - 1 / 16_000)) <= 4
    assert "limits.max_batch_size" in capped and f"costs {more} more" in capped
    assert schedule.exact_updates(CIFAR, "decay") == 80_000
    assert schedule.exact_updates(CIFAR, "hybrid", 1) == pytest.approx(
        60 * 50_000 / 128 + 144.8 * 50_000 / 640)


def test_phases_of_almost_one_noise_have_names_of_their_own():
    recipe = dataclasses.replace(CIFAR, falls=((60, 1.0000001), (120, 1.0000001), (160, 5)))
    names = [phase.name for phase in schedule.plan_phases(recipe, "decay", GHOST_128)]
    assert len(set(names)) == 4
    assert names[0] == "noise/1" and names[-1].startswith("noise/5.000001")


def test_the_ends_due_are_those_that_is_due_names():
    draw = random.Random(0)
    for _ in range(500):
        batch, updates = draw.randrange(1, 9), draw.randrange(1, 30)
        start = draw.randrange(50)
        end = start + batch * updates
        total = end if draw.random() < 0.5 else end + draw.randrange(1, 90)
        epochs, origin = draw.choice((0.3, 1.0, 2.5)), draw.choice((0, 7, 60))
        is_due = due.make_due({"eval": epochs}, 10, total, origin)
        every = due.interval(epochs, 10)
        assert is_due("eval", origin + every - 1, origin + every)
        expected = [at + batch for at in range(start, end, batch) if is_due("eval", at, at + batch)]
        assert list(due.ends_due(every, start, end, batch, total, origin)) == expected
