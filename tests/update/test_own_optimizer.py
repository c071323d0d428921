"""Optimizers by dotted path: Optax's own and a user's, through the real train path."""

import jax
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from bigbatch import train
from bigbatch.job import devices as job_devices
from bigbatch.mistake import Mistake
from bigbatch.plan import plan
from bigbatch.storage.logs import read_events
from tests.storage.test_continuing import assert_same_bits
from tests.support import own_optimizers
from tests.support.updates import (
    NO_AUGMENTATION,
    distance,
    inputs,
    prepare,
    training_set,
    with_model,
)

OWN = "tests.support.own_optimizers"
B1_B2 = {"b1": "momentum", "b2": "beta2"}
DECAY = {"weight_decay": "weight_decay"}
# name: its options, a learning rate, and settings.
OPTIMIZERS = {
    "optax.scale_by_lion": (B1_B2, 0.01, ("optimizer.decoupled=true",)),
    f"{OWN}.muon": ({"beta": "momentum", "b2": "beta2"}, 0.1, ("optimizer.decoupled=true",)),
    f"{OWN}.lars": ({"momentum": "momentum", **DECAY}, 20.0, ()),
    f"{OWN}.lamb": ({**B1_B2, **DECAY}, 0.1, ()),
}


def regression(*settings):
    """No gradient of it is 0 but for rounding, as before a norm, of which Lion takes the sign."""
    return with_model("support.foreign_models.Regression", {}, *settings)


def with_optimizer(name, options, *settings):
    config = regression(f"optimizer.name={name}", "exchange=linear", *settings)
    config.optimizer.options = ConfigDict(options)
    return config


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_learns_and_is_the_same_on_two_devices(name, tmp_path, monkeypatch):
    options, rate, settings = OPTIMIZERS[name]
    settings = (*settings, f"recipe.learning_rate={rate}", "recipe.epochs=1",
                "recipe.falls=((0.7,2),)", "log_every_epochs=0.01", *NO_AUGMENTATION)
    curves, states = [], []
    for count in (1, 2):
        monkeypatch.setattr(
            train, "make_mesh", lambda n=count, **_: job_devices.make_mesh(jax.devices()[:n]))
        config = with_optimizer(name, options, "dtype=float64", *settings)
        states.append(train.train_and_evaluate(config, tmp_path / str(count), show=False))
        curves.append([event["train_loss"] for event in
                       read_events(tmp_path / str(count) / "metrics.jsonl")])
    assert curves[0][-1] < 0.5 * curves[0][0]
    np.testing.assert_allclose(*curves, rtol=1e-9)
    assert distance(states[1], states[0]) < 1e-8


@pytest.mark.parametrize("name", [f"{OWN}.muon", f"{OWN}.lamb"])
def test_its_state_is_in_checkpoints(name, tmp_path):
    """Stopped after a phase and continued, a run has the bits of one that was not."""
    options, rate, settings = OPTIMIZERS[name]
    config = with_optimizer(name, options, *settings, f"recipe.learning_rate={rate}",
                            "recipe.epochs=1", "recipe.falls=((0.5,2),)")
    whole = train.train_and_evaluate(config, tmp_path / "whole", show=False)
    with pytest.raises(train.StoppedAfterPhase):
        train.train_and_evaluate(config, tmp_path / "run", stop_after_phase="0", show=False)
    assert_same_bits(train.train_and_evaluate(config, tmp_path / "run", show=False), whole, name)


REFERENCES = {
    "optax.scale_by_lion": lambda rate, m, b2, decay: optax.lion(rate, m, b2, weight_decay=decay),
    f"{OWN}.lars": lambda rate, m, b2, decay: optax.lars(rate, decay, momentum=m),
    f"{OWN}.lamb": lambda rate, m, b2, decay: optax.lamb(rate, m, b2, weight_decay=decay),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_updates_are_those_of_plain_optax(name):
    """Three updates, with the gradient that an update of plain SGD shows."""
    options, rate, settings = OPTIMIZERS[name]
    momentum, beta2, decay = 0.8, 0.97, 0.03
    common = ("dtype=float64", *NO_AUGMENTATION)
    updater = prepare(with_optimizer(
        name, options, *common, *settings, f"optimizer.weight_decay={decay}",
        f"optimizer.beta2={beta2}"), 2)
    sgd = prepare(regression(*common, "optimizer.name=sgd", "optimizer.weight_decay=0.0",
                             "recipe.momentum=0.0"))
    reference = REFERENCES[name](rate, momentum, beta2, decay)
    state, kept = updater.state, reference.init(updater.state.params)
    for number in range(3):
        before = jax.device_get(state)
        _, batches = inputs(updater, 48, 48 * number)
        _, plain = inputs(sgd, 48, 48 * number)
        moved, _ = sgd.take(
            jax.device_put(before._replace(opt_state=sgd.state.opt_state)), training_set(sgd),
            plain, 1.0, 0.0)
        gradient = jax.tree.map(np.subtract, before.params, jax.device_get(moved.params))
        steps, kept = reference.update(gradient, kept, before.params)
        state, _ = updater.take(state, training_set(updater), batches, rate, momentum)
        found = jax.tree.map(np.subtract, jax.device_get(state.params), before.params)
        assert distance(found, jax.device_get(steps)) < 1e-10, number


def test_decay_outside_of_the_optimizer_spares_what_the_config_says():
    """An optimizer that is not given the decay gets it as Optax's own do."""
    updater = prepare(with_optimizer(
        "optax.identity", {}, "dtype=float64", "optimizer.weight_decay=0.5",
        "optimizer.decoupled=true", "optimizer.weight_decay_on=no_norms_or_biases"))
    sgd = prepare(regression(
        "dtype=float64", "optimizer.name=sgd", "recipe.momentum=0.0", "optimizer.weight_decay=0.5",
        "optimizer.decoupled=true", "optimizer.weight_decay_on=no_norms_or_biases"))
    moved = [one.take(one.state, training_set(one), inputs(one, 48)[1], 0.1, 0.0)[0].params
             for one in (updater, sgd)]
    assert distance(*map(jax.device_get, moved)) < 1e-14


@pytest.mark.parametrize(("name", "options", "settings", "parts"), [
    ("optax.scale_by_loin", {}, (), ("no 'scale_by_loin'. Did you mean scale_by_lion?",)),
    ("optix.scale_by_lion", {}, (), ("config.optimizer.name is", "no module 'optix'")),
    ("lion", {}, (), ("allowed are momentum, nesterov, sgd, adam, or a dotted path such as",)),
    ("adam", {"b1": 0.9}, (), ("{'b1': 0.9}", "only an optimizer named by a dotted path")),
    ("optax.scale_by_lion", {"b3": 0.9}, (),
     ("unexpected keyword argument 'b3'; it takes b1, b2",)),
    (f"{OWN}.lamb", {}, (), ("own_optimizers.py:", "missing a required argument: 'b1'")),
    ("optax.lion", {}, (), ("missing a required argument: 'learning_rate'", "scale_by_ functions")),
    ("optax.lion", {"learning_rate": 0.1}, (), ("options.learning_rate is 0.1", "downhill")),
    ("optax.trace", {"decay": "learning_rate"}, (), ("options.decay is 'learning_rate'",)),
    (f"{OWN}.no_optimizer", {}, (), ("returns a float (", "own_optimizers.py:", "optax.chain")),
    (f"{OWN}.branching", {"momentum": "momentum"}, (),
     ("fails at ", "own_optimizers.py:", "without `if`")),
    (f"{OWN}.broken", {}, (), ("fails at ", "own_optimizers.py:", "TypeError")),
    (f"{OWN}.narrowing", {}, (), ("float32[2] before it and float16[2]", "['seen']")),
    (f"{OWN}.growing", {}, (), ("changes its state: ['seen'] is float32[2]", "float32[3]")),
    (f"{OWN}.forgetting", {}, (), ("changes its state: ['seen'] is missing after it",)),
    (f"{OWN}.with_key", {}, (), ("keeps key<", "jax.random.key_data")),
    (f"{OWN}.summing", {}, (), ("steps are not like the parameters: ['head']['bias']",)),
    (f"{OWN}.lars", {"momentum": 0.9, "weight_decay": "weight_decay"},
     ("optimizer.weight_decay_on=no_norms",), ("weight_decay_on is 'no_norms'", "'all'")),
])
def test_what_is_no_optimizer_is_refused_before_anything_is_written(
    name, options, settings, parts, tmp_path
):
    config = with_optimizer(name, options, *settings)
    for refusing in (lambda: train.train_and_evaluate(config, tmp_path / "run", show=False),
                     lambda: plan(config, 1)):
        with pytest.raises(Mistake) as refused:
            refusing()
        for part in parts:
            assert part in str(refused.value)
        assert "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_the_line_that_is_named_is_the_users():
    config = with_optimizer(f"{OWN}.branching", {"momentum": "momentum"})
    line = own_optimizers.branching.__code__.co_firstlineno + 1
    with pytest.raises(Mistake, match=rf"fails at .*/own_optimizers.py:{line}: "):
        plan(config, 1)
