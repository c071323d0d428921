"""What no schedule can be made of is refused with its value, what is allowed and what to change."""

import dataclasses
import math

import pytest

from bigbatch import schedule
from bigbatch.schedule import Limits, Recipe

CIFAR = Recipe(
    learning_rate=0.1, batch_size=128, momentum=0.9, examples=50_000, epochs=204.8,
    falls=((60, 5), (120, 5), (160, 5)),
)
GHOST_128 = Limits(ghost_size=128)


def plan(strategy="increase", limits=GHOST_128, hybrid_falls=1, **changes):
    return schedule.plan_phases(
        dataclasses.replace(CIFAR, **changes), strategy, limits, hybrid_falls)


NAN = math.nan
REFUSED = {
    # name: (what is different, strategy, limits, what the message must hold)
    "batch over the training set": (
        {"batch_size": 60_032}, "decay", GHOST_128, ("recipe.batch_size is 60032", "50000")),
    "limit over the training set": (
        {}, "increase", Limits(60_032, None, 128), ("limits.max_batch_size is 60032", "50000")),
    "first batch between two ghost batches": (
        {"batch_size": 200}, "decay", GHOST_128,
        ("recipe.batch_size is 200", "multiple of 128", "the ghost batch", "128 or 256")),
    "first batch off the user's granularity": (
        {}, "decay", Limits(None, 256, 128),
        ("recipe.batch_size is 128", "multiple of 256", "limits.granularity", "256")),
    "limit off the granularity": (
        {}, "increase", Limits(5000, None, 128),
        ("limits.max_batch_size is 5000", "multiple of 128", "4992 or 5120")),
    "granularity that cuts a ghost batch": (
        {}, "decay", Limits(None, 64, 128), ("limits.granularity is 64", "multiple", "128")),
    "granularity below 1": ({}, "decay", Limits(None, 0, 1), ("limits.granularity is 0",)),
    "ghost batch below 1": ({}, "decay", Limits(ghost_size=0), ("ghost_size is 0", "1 or more")),
    "no batch": ({"batch_size": 0}, "decay", GHOST_128, ("recipe.batch_size is 0", "128")),
    "negative batch": ({"batch_size": -128}, "decay", GHOST_128, ("recipe.batch_size is -128",)),
    "limit below the first batch": (
        {"batch_size": 640}, "increase", Limits(512, None, 128),
        ("limits.max_batch_size is 512", "640", "raise it or lower")),
    "phase without an update": (
        {"falls": ((60, 5), (60.001, 5))}, "decay", GHOST_128,
        ("'noise/5'", "no update", "3000050", "3000064", "move the fall")),
    "falls out of order": (
        {"falls": ((120, 5), (60, 5))}, "decay", GHOST_128,
        ("[120, 60]", "after the one before", "60 does not")),
    "two falls at once": (
        {"falls": ((60, 5), (60, 5))}, "decay", GHOST_128,
        ("[60, 60]", "60 does not", "recipe.falls")),
    "fall at the start": ({"falls": ((0, 5),)}, "decay", GHOST_128, ("[0] of 204.8", "over 0")),
    "fall at the end": (
        {"falls": ((204.8, 5),)}, "decay", GHOST_128,
        ("[204.8] of 204.8", "below the end", "recipe.epochs")),
    "fall nowhere": ({"falls": ((NAN, 5),)}, "decay", GHOST_128, ("nan",)),
    "factor of 1": (
        {"falls": ((60, 1),)}, "increase", GHOST_128, ("factor of 1", "epoch 60", "over 1")),
    "factor below 1": ({"falls": ((60, 0.2),)}, "increase", GHOST_128, ("0.2", "over 1")),
    "factor that is no number": ({"falls": ((60, NAN),)}, "increase", GHOST_128, ("nan",)),
    "endless factor": ({"falls": ((60, math.inf),)}, "increase", GHOST_128, ("inf", "finite")),
    "momentum of 1": ({"momentum": 1.0}, "decay", GHOST_128, ("recipe.momentum is 1.0", "[0, 1)")),
    "negative momentum": ({"momentum": -0.1}, "decay", GHOST_128, ("-0.1", "[0, 1)")),
    "momentum that is no number": ({"momentum": NAN}, "decay", GHOST_128, ("nan", "[0, 1)")),
    "no rate": (
        {"learning_rate": 0.0}, "decay", GHOST_128, ("recipe.learning_rate is 0.0", "over 0")),
    "rate that is no number": (
        {"learning_rate": NAN}, "decay", GHOST_128, ("recipe.learning_rate is nan", "finite")),
    "no epochs": ({"epochs": 0, "falls": ()}, "decay", GHOST_128, ("recipe.epochs is 0",)),
    "endless": ({"epochs": math.inf}, "decay", GHOST_128, ("recipe.epochs is inf", "finite")),
    "epochs that are no example": (
        {"epochs": 1e-6, "falls": ()}, "decay", GHOST_128,
        ("recipe.epochs is 1e-06", "less than one of the 50000 examples")),
    "fall before the first example": (
        {"falls": ((1e-6, 5), (60, 5))}, "decay", GHOST_128,
        ("recipe.falls has one at epoch 1e-06", "less than one of the 50000 examples")),
    "no examples": ({"examples": 0}, "decay", GHOST_128, ("recipe.examples is 0",)),
    "warm-up over a fall": (
        {"warmup_epochs": 70}, "decay", GHOST_128, ("warmup_epochs is 70", "epoch 60")),
    "warm-up to a fall": ({"warmup_epochs": 60}, "decay", GHOST_128, ("is 60", "first fall")),
    "warm-up over the end": (
        {"warmup_epochs": 205, "falls": ()}, "decay", GHOST_128, ("is 205", "204.8")),
    "warm-up before the start": ({"warmup_epochs": -1}, "decay", GHOST_128, ("is -1",)),
    "warm-up that is no number": ({"warmup_epochs": NAN}, "decay", GHOST_128, ("is nan",)),
    "warm-up downwards": (
        {"warmup_epochs": 5, "warmup_learning_rate": 0.2}, "decay", GHOST_128,
        ("warmup_learning_rate is 0.2", "0.1")),
    "warm-up from below zero": (
        {"warmup_epochs": 5, "warmup_learning_rate": -0.1}, "decay", GHOST_128,
        ("warmup_learning_rate is -0.1", "between 0 and")),
    "growth past the training set": (
        {"falls": ((60, 5), (120, 5), (160, 5), (180, 5))}, "increase", GHOST_128,
        ("from 16000 to 80000", "50000", "limits.max_batch_size", "4992")),
    "falls without factors": (
        {"falls": ((60,),)}, "decay", GHOST_128, ("recipe.falls is ((60,),)", "pairs of (epoch,")),
    "falls in texts": (
        {"falls": (("60", "5"),)}, "increase", GHOST_128, ("recipe.falls is (('60', '5'),)",)),
    "one fall and no tuple of falls": ({"falls": (60, 5)}, "hybrid", GHOST_128, ("is (60, 5)",)),
    "falls that are a number": ({"falls": 60}, "hybrid", GHOST_128, ("recipe.falls is 60",)),
    "strategy": ({}, "incraese", GHOST_128, ("'incraese'", "constant, decay, hybrid, increase")),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_schedule_is_refused_with_value_and_remedy(name):
    changes, strategy, limits, parts = REFUSED[name]
    with pytest.raises(ValueError) as refused:
        plan(strategy, limits, **changes)
    for part in parts:
        assert part in str(refused.value)
    assert "\n" not in str(refused.value)


def test_the_limit_that_growth_past_the_training_set_is_told_to_set_works():
    # The message names 4992, the last multiple of 128 up to a tenth of 50 000.
    falls = ((60, 5), (120, 5), (160, 5), (180, 5))
    assert plan(limits=Limits(4992, None, 128), falls=falls)[-1].batch_size == 4992


@pytest.mark.parametrize("hybrid_falls", (-1, 4))
def test_hybrid_needs_as_many_falls_as_it_pays(hybrid_falls):
    with pytest.raises(ValueError, match=f"hybrid_falls is {hybrid_falls}.*between 0 and 3"):
        plan("hybrid", hybrid_falls=hybrid_falls)


@pytest.mark.parametrize(("rate", "momentum", "parts"), (
    (1.3, None, ("166.4", "no multiple of 128", "change scale_up")),
    (1.0, 0.95001, ("no multiple of 128",)),
    (0.1, None, ("12.8", "no multiple of 128")),
    (0.0, None, ("scale_up.learning_rate is 0.0", "over 0")),
    (-1.0, None, ("scale_up.learning_rate is -1.0", "over 0")),
    (NAN, None, ("scale_up.learning_rate is nan",)),
    (math.inf, None, ("scale_up.learning_rate is inf",)),
    (1.0, 1.0, ("scale_up.momentum is 1.0", "[0, 1)")),
    (1.0, NAN, ("scale_up.momentum is nan", "[0, 1)")),
    (500.0, None, ("from 128 to 64000", "over the 50000", "scale up by less")),
))
def test_scale_up_refuses_what_it_cannot_make_a_batch_of(rate, momentum, parts):
    with pytest.raises(ValueError) as refused:
        schedule.scale_up(CIFAR, rate, momentum, granularity=128)
    for part in parts:
        assert part in str(refused.value)
