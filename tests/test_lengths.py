"""Lengths of a run in the user's unit: what they come to, where they may stand, what is refused."""

import copy
import json
import re
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigbatch.config import (
    base_config,
    check,
    epochs_of,
    evaluations,
    lengths,
    make_due,
    make_phases,
    make_recipe,
    make_strategy,
    saved_config,
    set_from_text,
    tokens_per_example,
)
from bigbatch.mistake import Mistake
from bigbatch.schedule import STRATEGIES
from bigbatch.storage import continuing
from tests.support import configs

A_TASK_OF_TOKENS = SimpleNamespace(tokens=lambda config: 128)


def examples_of(text, examples=1000, tokens=None, batch=50):
    return round(lengths.in_epochs(text, examples, tokens, batch, "it") * examples)


@pytest.mark.parametrize(("text", "expected"), (
    ("3 epochs", 3000), ("0.5 epochs", 500), ("5e5 examples", 500_000), ("12345 examples", 12_345),
    ("2000 updates", 100_000), ("1.2e9 tokens", 9_375_000), ("1_024 tokens", 8), (".5 epochs", 500),
    ("193 tokens", 2), ("191 tokens", 1), ("1 tokens", 1), ("0 tokens", 0), ("3epochs", 3000),
    ("  3  epochs ", 3000), ("1E3 examples", 1000), ("9007199254740 examples", 9_007_199_254_740),
))
def test_a_length_is_the_nearest_whole_number_of_examples(text, expected):
    assert examples_of(text, tokens=128) == expected


@given(wanted=st.integers(1, 10**14), examples=st.integers(1, 2**31 - 1))
def test_so_many_examples_are_exactly_so_many(wanted, examples):
    assert examples_of(f"{wanted} examples", examples) == wanted


@given(st.floats(0, 1e6), st.integers(1, 2**31 - 1))
def test_a_number_and_a_text_of_epochs_are_the_same_to_the_last_bit(number, examples):
    assert lengths.in_epochs(number, examples, None, 1, "it") is number
    assert lengths.in_epochs(f"{number!r} epochs", examples, None, 1, "it") == number


@pytest.mark.parametrize(("text", "parts"), (
    ("3 epoch", ("it is '3 epoch'", "epochs, examples, tokens, updates")),
    ("3 Tokens", ("units of a length are epochs, examples, tokens, updates",)),
    ("3", ("it is '3'; it must be a number of epochs, or a length such as '3 epochs'",)),
    ("three epochs", ("it must be a number of epochs",)),
    ("1e9999 tokens", ("it must be",)),
    ("1e999 examples", ("it must be",)),
    (f"{10**400} updates", ("it must be",)),
    ("1e400000000 examples", ("it must be",)),
    ("e5 tokens", ("it must be",)),
    ("_ tokens", ("it must be",)),
    ("nan tokens", ("it must be",)),
    ("", ("it must be",)),
    ("1e9 tokens", ("the examples of config.task have no tokens",)),
))
def test_what_is_no_length_is_told_in_one_line(text, parts):
    with pytest.raises(Mistake) as refused:
        lengths.in_epochs(text, 1000, None, 50, "it")
    for part in parts:
        assert part in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_key_of_a_length_takes_a_number_as_before_and_a_text():
    config = base_config()
    config.recipe.epochs = 7  # becomes a float, as in the run.json of older runs
    assert json.loads(config.to_json())["recipe"]["epochs"] == 7.0
    assert isinstance(config.recipe.epochs, float)
    config.recipe.update({"epochs": "5e5 examples", "warmup_epochs": 1})
    assert (config.recipe.epochs, config.recipe.warmup_epochs) == ("5e5 examples", 1.0)
    set_from_text(config, "eval_every_epochs", "1e6 examples")
    set_from_text(config, "log_every_epochs", "2")
    assert (config.eval_every_epochs, config.log_every_epochs) == ("1e6 examples", 2.0)
    for wrong in ("many", "1e6 examples and more", "True", "(1, 2)", "'3 epochs'"):
        with pytest.raises(Mistake, match="log_every_epochs takes a number of epochs, or a length"):
            set_from_text(config, "log_every_epochs", wrong)
    for value in (True, None, (1.0,)):
        if value is not None:
            with pytest.raises(TypeError):
                config.recipe.epochs = value
    other = copy.deepcopy(config)
    other.recipe.epochs = 1.0
    assert config.recipe.epochs == "5e5 examples"
    assert base_config().recipe.epochs == 1.0
    assert "5e5 examples" in str(config)


def test_the_configs_that_came_along_say_what_they_said():
    config = configs.load("cifar10", "increase")
    assert json.loads(config.to_json())["recipe"]["epochs"] == 204.8
    assert make_recipe(config).epochs == config.recipe.epochs


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_run_stated_in_examples_or_updates_is_the_run_stated_in_epochs(strategy):
    """1437 examples an epoch, so that no position is a short number of epochs."""
    plain = configs.load("digits", "increase,recipe.batch_size=16")
    texts = configs.load("digits", "increase,recipe.batch_size=16")
    for config in (plain, texts):
        config.strategy = strategy
        config.limits.max_batch_size = 128
    n = plain.data.train_examples
    plain.recipe.update({"epochs": 5000 / n, "warmup_epochs": 160 / n,
                         "falls": ((1000 / n, 2.0), (3200 / n, 4.0))})
    plain.by_hand, plain.ramp = ((2000 / n, 32),), ()
    plain.eval_every_epochs, plain.log_every_epochs = 777 / n, 1.0
    texts.recipe.update({"epochs": "5000 examples", "warmup_epochs": "10 updates",
                         "falls": (("1e3 examples", 2.0), ("200 updates", 4.0))})
    texts.by_hand, texts.ramp = (("2000 examples", 32),), ()
    texts.eval_every_epochs, texts.log_every_epochs = "777 examples", "1 epochs"
    check(texts)
    assert make_recipe(texts) == make_recipe(plain)
    assert make_strategy(texts) == make_strategy(plain)
    phases = make_phases(texts)
    assert phases == make_phases(plain) and phases[-1].nominal_end_example == 5000
    total = phases[-1].end_example
    assert list(evaluations(texts, phases, 0, total)) == list(evaluations(plain, phases, 0, total))
    one, other = (make_due(config, total) for config in (texts, plain))
    for start in range(0, 4000, 16):
        for what in ("log", "eval", "checkpoint"):
            assert one(what, start, start + 16) == other(what, start, start + 16)
    # A run that began in one unit goes on in the other, and its file gives back what it holds.
    saved = continuing.describe_run(texts, phases, continuing.Position(1600, 100))
    assert saved_config(saved).to_json() == texts.to_json()
    refused, allowed = continuing.changes(json.loads(json.dumps(saved)), plain, phases)
    assert not refused and any("recipe.epochs: '5000 examples' saved" in text for text in allowed)


def test_a_task_with_tokens_takes_lengths_in_tokens(monkeypatch):
    config = configs.load("digits", "increase")
    assert tokens_per_example(config) is None
    with pytest.raises(Mistake, match="config.recipe.epochs is '1e6 tokens', but the examples of"):
        config.recipe.epochs = "1e6 tokens"
        make_recipe(config)
    with config.unlocked():
        config.task = "tests.test_lengths.A_TASK_OF_TOKENS"
    assert tokens_per_example(config) == 128
    config.recipe.falls = (("256000 tokens", 5),)
    recipe = make_recipe(config)
    assert round(recipe.epochs * recipe.examples) == 7812  # 7812.5, to the even one
    assert round(recipe.falls[0][0] * recipe.examples) == 2000
    assert epochs_of(config, "recipe.epochs") == recipe.epochs


@pytest.mark.parametrize(("key", "value", "text"), (
    ("recipe.falls", (("3 epoch", 5),), "an epoch of recipe.falls is '3 epoch'; the units of a"),
    ("recipe.falls", (("3", 5),), "recipe.falls is (('3', 5),); it must be pairs of (epoch, fact"),
    ("recipe.epochs", "3 epoch", "config.recipe.epochs is '3 epoch'; the units of a length are"),
    ("recipe.epochs", "soon", "config.recipe.epochs is 'soon'; it must be a number of epochs, or"),
    ("log_every_epochs", "0 examples", "config.log_every_epochs is 0 examples; it must be a fin"),
    ("eval_every_epochs", "-1 epochs", "config.eval_every_epochs is -1 epochs; it must be a fini"),
))
def test_a_length_of_no_use_is_refused_by_its_key(key, value, text):
    config = configs.load("digits", "increase")
    group, _, name = key.rpartition(".")
    (config[group] if group else config)[name] = value
    with pytest.raises(Mistake, match=re.escape(text)) as refused:
        check(config)
    assert "\n" not in str(refused.value)
