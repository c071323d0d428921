"""Losses and optimizers against their closed forms, through the real update."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bigbatch.job.devices import cut, place
from bigbatch.update.optimizer import make_optimizer
from tests.support.updates import (
    NO_AUGMENTATION,
    conv_net,
    distance,
    inputs,
    pictures,
    prepare,
    training_set,
    with_model,
)


def softmax(logits):
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def test_smoothing_and_auxiliary_losses_enter_the_gradient_as_stated():
    """And the loss that is measured is the plain one of the main logits."""
    smoothing, weight, rate = 0.1, 0.3, 0.5
    updater = prepare(with_model(
        "support.foreign_models.Regression", {"auxiliary_weight": weight}, "dtype=float64",
        "optimizer.name=sgd", "recipe.momentum=0.0", "optimizer.weight_decay=0.0",
        f"label_smoothing={smoothing}", *NO_AUGMENTATION), 2)
    before = jax.device_get(updater.state.params)
    records, batches = inputs(updater, 48)
    images, targets = pictures(updater, records)
    pixels = images.reshape(48, 64)
    smoothed = (1 - smoothing) * targets + smoothing / 10
    state, measured = updater.take(
        updater.state, training_set(updater), batches, rate, 0.0)
    for name, weighs in (("head", 1.0), ("auxiliary", weight)):
        layer = before[name]
        given = softmax(pixels @ layer["kernel"] + layer["bias"])
        slope = weighs * (given - smoothed) / 48
        moved = jax.tree.map(np.subtract, jax.device_get(state.params[name]), layer)
        expected = {"kernel": -rate * pixels.T @ slope, "bias": -rate * slope.sum(axis=0)}
        assert distance(moved, expected) < 1e-12, name
        if name == "head":
            assert measured.loss == pytest.approx(-np.log(given[targets > 0]).mean(), rel=1e-12)
            right = (given.argmax(axis=1) == targets.argmax(axis=1)).mean()
            assert measured.means["accuracy"] == pytest.approx(right, abs=1e-12)


def test_an_example_that_is_of_no_use_counts_for_nothing():
    """As an image that could not be read is fed: the mean is over the others."""
    updater = prepare(with_model(
        "support.foreign_models.Regression", {}, "dtype=float64", "ghost_size=2",
        "optimizer.name=sgd", "recipe.momentum=0.0", "optimizer.weight_decay=0.0",
        *NO_AUGMENTATION))
    data, layer = updater.config.data, jax.device_get(updater.state.params)["head"]
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 1), np.uint8)
    examples = np.array([[0, 0, at, after] for at, after in enumerate((1, 1, 0, 0))], np.int32)
    fed = {"examples": examples, "images": images, "labels": np.array([3, 9, 5, 7], np.int32),
           "usable": np.array([True, False, True, True])}
    state, measured = updater.take(
        updater.state, {"seed": np.uint32(0)}, [place(fed, cut(updater.mesh))], 1.0, 0.0)

    read = [0, 2, 3]
    pixels = ((images[read] - np.array(data.mean)) / data.std).reshape(3, 64)
    given, targets = softmax(pixels @ layer["kernel"] + layer["bias"]), np.eye(10)[[3, 5, 7]]
    slope = (given - targets) / 3
    moved = jax.tree.map(np.subtract, jax.device_get(state.params["head"]), layer)
    expected = {"kernel": -pixels.T @ slope, "bias": -slope.sum(axis=0)}
    assert distance(moved, expected) < 1e-12
    assert measured.loss == pytest.approx(-np.log(given[targets > 0]).mean(), rel=1e-12)
    assert measured.means["accuracy"] == pytest.approx(
        (given.argmax(axis=1) == targets.argmax(axis=1)).mean())


def reference_step(name, g, w, kept, rate, momenta, decay, decoupled):
    """One parameter array's step, as the optimizers' papers have it; `kept` is what they keep.

    `momenta`: of all updates so far. Adam's averages are divided by what gradients weigh in them.
    """
    momentum, number = momenta[-1], len(momenta)
    coupled, shrink = (0.0, decay) if decoupled else (decay, 0.0)
    g = g + coupled * w
    if name == "adam":
        first, second = kept
        first = momentum * first + (1 - momentum) * g
        second = 0.999 * second + 0.001 * g**2
        corrected = first / (1 - np.prod(momenta)), second / (1 - 0.999**number)
        step, kept = corrected[0] / (np.sqrt(corrected[1]) + 1e-8), (first, second)
    else:
        kept = (0.0 if name == "sgd" else momentum) * kept[0] + g, 0.0
        step = g + momentum * kept[0] if name == "nesterov" else kept[0]
    # The rate comes last, so a change of it asks for no correction of what was accumulated.
    return w - rate * (step + shrink * w), kept


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("name", ["sgd", "momentum", "nesterov", "adam"])
def test_optimizers_over_changes_of_rate_and_momentum(name, decoupled):
    """Three updates with one compiled program: the rate and the momentum are its inputs."""
    decay = 0.05
    updater = prepare(with_model(
        "support.foreign_models.Regression", {}, "dtype=float64", f"optimizer.name={name}",
        f"optimizer.weight_decay={decay}", f"optimizer.decoupled={decoupled}",
        "recipe.momentum=0.0", *NO_AUGMENTATION))
    resident, state = training_set(updater), updater.state
    expected = jax.device_get(state.params)["head"]
    kept = {key: (0.0, 0.0) for key in expected}
    momenta = []
    for number, (rate, momentum) in enumerate([(0.5, 0.9), (0.05, 0.9), (0.1, 0.6)], 1):
        momenta.append(momentum)
        records, batches = inputs(updater, 48, 48 * number)
        images, targets = pictures(updater, records)
        pixels = images.reshape(48, 64)
        slope = (softmax(pixels @ expected["kernel"] + expected["bias"]) - targets) / 48
        gradient = {"kernel": pixels.T @ slope, "bias": slope.sum(axis=0)}
        stepped = {
            key: reference_step(name, gradient[key], expected[key], kept[key], rate, momenta,
                                decay, decoupled)
            for key in expected
        }
        expected = {key: step[0] for key, step in stepped.items()}
        kept = {key: step[1] for key, step in stepped.items()}
        if number == 1:
            program = updater.functions.update.lower(
                state, resident, batches[0], updater.rates(rate, momentum)).compile()
        state, _ = program(state, resident, batches[0], updater.rates(rate, momentum))
        assert distance(jax.device_get(state.params)["head"], expected) < 1e-12, number


@cache
def plain_gradient():
    """Of the first update, as a step of plain SGD of rate 1 shows it; and the parameters before."""
    updater = prepare(conv_net(
        "dtype=float64", "optimizer.name=sgd", "recipe.momentum=0.0", "optimizer.weight_decay=0.0"))
    before = jax.device_get(updater.state.params)
    state, _ = updater.take(
        updater.state, training_set(updater), inputs(updater, 64)[1], 1.0, 0.0)
    return jax.tree.map(np.subtract, before, jax.device_get(state.params)), before


@pytest.mark.parametrize(("share", "devices", "passes"), [
    (0.3, 1, 1), (0.3, 2, 2), (0.3, 4, 1), (2.0, 2, 1)])
def test_what_is_clipped_is_the_gradient_of_the_whole_update(share, devices, passes):
    """By Optax's rule, before L2 decay is added; a norm below the bound is left as it is."""
    jax.config.update("jax_enable_x64", True)
    gradient, before = plain_gradient()
    bound, decay, rate = share * float(optax.tree.norm(gradient)), 0.05, 0.3
    clipped, _ = optax.clip_by_global_norm(bound).update(gradient, optax.EmptyState())
    assert (distance(clipped, gradient) > 0.5) == (share < 1)
    updater = prepare(conv_net(
        "dtype=float64", "optimizer.name=momentum", f"optimizer.clip_norm={bound!r}",
        f"optimizer.weight_decay={decay}", f"microbatches={passes}"), devices)
    state, _ = updater.take(
        updater.state, training_set(updater), inputs(updater, 64)[1], rate, 0.9)
    moved = jax.tree.map(np.subtract, jax.device_get(state.params), before)
    expected = jax.tree.map(lambda g, w: -rate * (g + decay * w), clipped, before)
    assert distance(moved, expected) < 1e-10


NORMS = {"norm1.scale", "norm1.bias", "norm2.scale", "norm2.bias"}
LINEN_NORMS = {"net.ToLinen_0.scale", "net.ToLinen_0.bias", "net.last.scale", "net.last.bias"}


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize(("model", "on", "spared"), [
    ("ConvNet", "all", set()),
    ("ConvNet", "no_norms", NORMS),
    ("ConvNet", "no_norms_or_biases", NORMS | {"conv1.bias", "head.bias"}),
    ("FromLinen", "all", set()),
    ("FromLinen", "no_norms", LINEN_NORMS),
    ("FromLinen", "no_norms_or_biases", LINEN_NORMS | {"net.Conv_0.bias", "net.Dense_0.bias"}),
])
def test_weight_decay_leaves_out_what_it_says(model, on, spared, decoupled):
    """Without a gradient, a step is the decay alone."""
    config = with_model(
        f"support.foreign_models.{model}", {"ghost_size": 16}, f"optimizer.weight_decay_on={on}",
        "optimizer.weight_decay=0.5", f"optimizer.decoupled={decoupled}")
    updater = prepare(config)
    ones = jax.tree.map(jnp.ones_like, updater.state.params)
    optimizer = make_optimizer(config, updater.net.in_norm, updater.rates(0.25, 0.9))
    steps, _ = optimizer.update(jax.tree.map(jnp.zeros_like, ones), optimizer.init(ones), ones)
    found = {
        ".".join(str(key.key) for key in path): np.unique(leaf).tolist()
        for path, leaf in jax.tree_util.tree_leaves_with_path(steps)
    }
    assert spared <= set(found)
    for name, values in found.items():
        assert values == ([0.0] if name in spared else [-0.125]), name


