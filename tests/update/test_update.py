"""An update does not depend on the hardware, and is the one ghost batch by ghost batch."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bigbatch.data.resident import lay_out
from bigbatch.job.devices import cut, place, replicated
from bigbatch.schedule.layout import make_layout
from tests.support import foreign_models, plain_wide_resnet
from tests.support.configs import tiny
from tests.support.updates import (
    NO_AUGMENTATION,
    conv_net,
    distance,
    inputs,
    pictures,
    prepare,
    train,
    training_set,
    with_model,
)


# --- the hardware --------------------------------------------------------------------------------
@cache
def on_one_device(*settings, updates=20, **model):
    return train(conv_net("dtype=float64", *settings, **model), 1, updates)


@pytest.mark.parametrize(("devices", "passes"), [
    (2, 1), (3, 1), (4, 1), (8, 1), (1, 2), (1, 4), (3, 2), (8, 2),
])
def test_devices_and_passes_change_nothing(devices, passes):
    """Parameters, statistics and optimizer state in float64, through a change of phase.

    Updates of 3 ghost batches, then of 9: shares on 2, 4 and 8 devices are uneven.
    """
    settings = ("recipe.falls=((0.3,3),)", "limits.max_batch_size=144", *NO_AUGMENTATION)
    states, measured = train(
        conv_net("dtype=float64", *settings, f"microbatches={passes}"), devices)
    references, expected = on_one_device(*settings)
    for name, tree, other in zip(states[-1]._fields, states[-1], references[-1], strict=True):
        assert distance(tree, other) <= 1e-10, name
    for name in ("loss", "accuracy"):
        np.testing.assert_allclose(
            *([one.means[name] for one in each] for each in (measured, expected)),
            rtol=1e-10, err_msg=name,
        )
    np.testing.assert_allclose(  # the noise scale by the norms
        *([one.noise.by_norms for one in each] for each in (measured, expected)), rtol=1e-10)
    assert measured[-1].loss < measured[0].loss


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_wide_resnet_is_the_same_on_eight_devices_and_in_single_ghost_batches(dtype):
    """Twenty updates of 3, then 6 ghost batches: one slot on each device, or up to six passes."""
    settings = ("recipe.falls=((0.3,2),)", "limits.max_batch_size=96", f"dtype={dtype}",
                *NO_AUGMENTATION)
    states, measured = train(tiny(*settings), 8)
    references, expected = train(tiny(*settings, "microbatches=100"), 1)
    # In float32 rounding grows from update to update.
    after, most = (-1, 1e-10) if dtype == "float64" else (0, 1e-6)
    for name, tree, other in zip(
        states[after]._fields, states[after], references[after], strict=True
    ):
        assert distance(tree, other) <= most, name
    assert measured[-1].loss == pytest.approx(expected[-1].loss, rel=0.01)
    assert measured[-1].loss < 0.7 * measured[0].loss


@pytest.mark.parametrize(("devices", "passes"), [(4, 1), (1, 2)])
def test_dropout_and_augmentation_follow_the_example(devices, passes):
    """With masks and crops drawn, still the same parameters; and they are drawn."""
    references, _ = on_one_device(updates=3, dropout_rate=0.4)
    config = conv_net("dtype=float64", f"microbatches={passes}", dropout_rate=0.4)
    states, _ = train(config, devices, 3)
    assert distance(states[-1], references[-1]) <= 1e-10
    plain, _ = on_one_device(*NO_AUGMENTATION, updates=3)
    assert distance(plain[-1].params, references[-1].params) > 1e-3


class ByKey(nnx.Module):
    """Logits that follow from an example's dropout key alone."""

    def __init__(self, num_classes, dtype, rngs):
        self.bias = nnx.Param(jnp.zeros(num_classes))

    def __call__(self, images, train, keys):
        return self.bias + jax.vmap(lambda key: jax.random.normal(key, (10,)))(keys)


class ByPixel(nnx.Module):
    """Logits that follow from an example's corner pixel alone."""

    def __init__(self, num_classes, dtype, rngs):
        self.bias = nnx.Param(jnp.zeros(num_classes))

    def __call__(self, images, train, keys):
        return self.bias + images[:, :1, 0, 0] * jnp.arange(10.0)


@pytest.mark.parametrize("model", [ByKey, ByPixel])
def test_draws_follow_the_epoch_and_the_place_in_it(model):
    """And not the record or the batch: what an update measures tells what was drawn."""
    config = with_model(
        f"update.test_update.{model.__name__}", {}, "ghost_size=1", "data.augment.crop=4")
    updater = prepare(config)
    # Record 1 is record 0's double, so that only the draws can tell them apart.
    resident = place({
        "images": lay_out(
            np.random.default_rng(0).integers(0, 255, (1, 8, 8, 1), np.uint8).repeat(2, 0)),
        "labels": lay_out(np.full(2, 3, np.int32)), "seed": np.uint32(config.seed),
    }, replicated(updater.mesh))
    state = updater.state

    def loss(record, epoch, place_):
        nonlocal state
        batches = updater.batches(
            np.array([[record, epoch, place_]], np.int32), make_layout(1, 1, 1, 1, 0))
        state, measured = updater.take(state, resident, batches, 0.0, 0.0)
        return float(measured.loss)

    drawn = {(epoch, at): loss(0, epoch, at) for epoch in range(3) for at in range(4)}
    # Crops may coincide: 8 pixels and a pad of 1 have 7 x 7 places for one of 4.
    assert len(set(drawn.values())) >= (12 if model is ByKey else 8), drawn
    assert drawn == {(epoch, at): loss(1, epoch, at) for epoch, at in drawn}
    config.seed = 1
    resident = resident | {"seed": np.uint32(1)}
    updater = prepare(config)
    state = updater.state
    assert loss(0, 0, 0) != drawn[0, 0] or loss(0, 0, 1) != drawn[0, 1]


# --- the gradient and the statistics -------------------------------------------------------------
@pytest.mark.parametrize(("devices", "passes"), [(8, 1), (1, 100)])
def test_a_step_of_sgd_is_the_rate_times_the_mean_gradient(devices, passes):
    """And the statistics are k folds: against the network in plain JAX, ghost batch by ghost batch.

    A gradient added up over devices instead of averaged would be 8 times as large. The noise scale
    is that of the ghost batches' gradients, as each device or pass takes one: over all parameters,
    and over scales and biases.
    """
    rate, ghost, decay = 0.25, 16, 0.99
    updater = prepare(tiny(
        "dtype=float64", "optimizer.name=sgd", "recipe.momentum=0.0", "optimizer.weight_decay=0.0",
        f"microbatches={passes}", "noise.by_groups=true", *NO_AUGMENTATION), devices)
    before = jax.device_get(updater.state)
    records, batches = inputs(updater, 5 * ghost)
    images, targets = pictures(updater, records)
    ghosts = [slice(start, start + ghost) for start in range(0, 5 * ghost, ghost)]

    @jax.jit
    @jax.value_and_grad
    def mean_loss(params, images, targets):
        logits, _ = plain_wide_resnet.forward(params, images)
        return -(targets * jax.nn.log_softmax(logits)).sum(axis=1).mean()

    parts = [mean_loss(before.params, images[part], targets[part]) for part in ghosts]
    gradient = jax.tree.map(lambda *leaves: sum(leaves) / 5, *[part[1] for part in parts])
    statistics = jax.jit(lambda *arrays: plain_wide_resnet.forward(*arrays)[1])
    running = plain_wide_resnet.in_order(before.batch_stats)
    for part in ghosts:
        running = jax.tree.map(
            lambda old, new: decay * old + (1 - decay) * new, running,
            statistics(before.params, images[part]),
        )

    state, measured = updater.take(
        updater.state, training_set(updater), batches, rate, 0.0)
    moved = jax.tree.map(np.subtract, jax.device_get(state.params), before.params)
    expected = jax.tree.map(lambda leaf: -rate * leaf, gradient)
    assert distance(moved, expected) < 1e-12
    assert distance(plain_wide_resnet.in_order(state.batch_stats), running) < 1e-12
    assert measured.loss == pytest.approx(np.mean([part[0] for part in parts]), rel=1e-12)
    assert measured.finite
    assert measured.noise.groups == 5
    norms = [copy for copy in jax.tree.leaves(updater.net.copied)]
    assert 0 < sum(norms) < len(norms)
    for found, chosen in ((measured.noise.by_groups, [True] * len(norms)),
                          (measured.noise.by_norms, norms)):
        gradients_Gxd = np.array([
            np.concatenate([leaf.ravel() for leaf, is_in in zip(
                jax.tree.leaves(part[1]), chosen, strict=True) if is_in]) for part in parts])
        products = gradients_Gxd @ gradients_Gxd.T
        square = (products.sum() - products.trace()) / 20  # the pairs of two of five
        spread = gradients_Gxd.var(axis=0, ddof=1).sum() * ghost
        np.testing.assert_allclose(found, (square, spread), rtol=1e-9)


class FlaxNorm(nnx.Module):
    """Flax's own, called as ours is."""

    def __init__(self, features, *, ghost_size, dtype, rngs):
        self.inner = nnx.BatchNorm(
            features, momentum=0.9, dtype=dtype, param_dtype=dtype, rngs=rngs)
        self.inner.mean.set_value(jnp.zeros(features, dtype))
        self.inner.var.set_value(jnp.ones(features, dtype))

    def __call__(self, x, train):
        return self.inner(x, use_running_average=not train)


def test_a_ghost_batch_of_the_whole_batch_is_flaxs_training():
    """Three updates of momentum: parameters and running statistics, on eight devices."""
    config = conv_net("dtype=float64", "ghost_size=48", "optimizer.weight_decay=0.0",
                      *NO_AUGMENTATION, ghost_size=48)
    updater = prepare(config, 8)
    resident, state = training_set(updater), updater.state
    reference = foreign_models.ConvNet(
        10, jnp.float64, nnx.Rngs(0), ghost_size=48, norm=FlaxNorm)

    def theirs(kind):
        """Flax's variables under our names."""
        flat = nnx.to_flat_state(nnx.state(reference, kind))
        return {tuple(part for part in path if part != "inner"): leaf for path, leaf in flat}

    def ours(tree):
        return {tuple(key.key for key in path): leaf
                for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}

    for path, leaf in theirs(nnx.Param).items():
        leaf.set_value(jnp.asarray(jax.device_get(ours(state.params)[path])))
    trace = {path: 0.0 for path in theirs(nnx.Param)}
    graph, *_ = nnx.split(reference, nnx.Param, nnx.BatchStat)

    @jax.jit
    def gradient_and_statistics(params, batch_stats, images, targets):
        def mean_loss(params):
            module = nnx.merge(graph, params, batch_stats, copy=True)
            losses = -(targets * jax.nn.log_softmax(module(images, True, None))).sum(axis=1)
            return losses.mean(), nnx.state(module, nnx.BatchStat)
        return jax.grad(mean_loss, has_aux=True)(params)

    for number in range(3):
        records, batches = inputs(updater, 48, 48 * number)
        _, params, batch_stats = nnx.split(reference, nnx.Param, nnx.BatchStat)
        gradient, new_stats = gradient_and_statistics(
            params, batch_stats, *pictures(updater, records))
        nnx.update(reference, new_stats)
        steps = {
            tuple(part for part in path if part != "inner"): leaf[...]
            for path, leaf in nnx.to_flat_state(gradient)
        }
        for path, leaf in theirs(nnx.Param).items():
            trace[path] = 0.9 * trace[path] + steps[path]
            leaf.set_value(leaf[...] - 0.5 * trace[path])
        state, _ = updater.take(state, resident, batches, 0.5, 0.9)
    for kind, tree in ((nnx.Param, state.params), (nnx.BatchStat, state.batch_stats)):
        expected = {path: leaf[...] for path, leaf in theirs(kind).items()}
        assert distance(jax.device_get(ours(tree)), jax.device_get(expected)) < 1e-12


def test_running_statistics_count_examples_and_not_updates():
    """With the parameters held, the same 96 examples in 6, 2 or 1 updates leave the same."""
    updater = prepare(conv_net("dtype=float64", *NO_AUGMENTATION), 4)
    resident, left = training_set(updater), []
    for batch_size in (16, 48, 96):
        # One after the other through copies, because an update's state is donated.
        state = jax.tree.map(jnp.copy, updater.state)
        for start in range(0, 96, batch_size):
            _, batches = inputs(updater, batch_size, start)
            state, _ = updater.take(state, resident, batches, 0.0, 0.9)
        left.append(jax.device_get(state.batch_stats))
    assert distance(left[1], left[0]) < 1e-12
    assert distance(left[2], left[0]) < 1e-12
    assert distance(left[0], jax.device_get(updater.state.batch_stats)) > 0.1


class Exploding(nnx.Module):
    """Not finite for an image of 255s: its logits, and a statistic of a layer nobody reads."""

    def __init__(self, num_classes, dtype, rngs):
        self.head = nnx.Linear(64, num_classes, rngs=rngs)
        self.norm = foreign_models.GhostBatchNorm(1, ghost_size=2, rngs=rngs)

    def __call__(self, images, train, keys):
        pixels_Bx64 = images.reshape(len(images), -1)
        worst_Bx1 = pixels_Bx64.min(axis=1, keepdims=True)
        blown_Bx1 = jnp.where(worst_Bx1 >= 1.0, jnp.inf, worst_Bx1)
        self.norm(blown_Bx1, train)
        return self.head(pixels_Bx64) + jnp.where(blown_Bx1 == jnp.inf, jnp.inf, 0.0)


def test_an_empty_slot_adds_nothing_whatever_comes_out_of_it():
    """Not to the gradient either, where 0 times a slope that is not finite would be a nan."""
    updater = prepare(with_model(
        "update.test_update.Exploding", {}, "ghost_size=2", "data.mean=(0.0,)", "data.std=(255.0,)",
        *NO_AUGMENTATION), 2)
    images = np.random.default_rng(0).integers(0, 200, (4, 8, 8, 1), np.uint8)
    left = []
    for shown_when_empty in (images[2:], np.full_like(images[2:], 255)):
        fed = place({
            "examples": np.array([[0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, -1], [0, 0, 0, -1]],
                                 np.int32),
            "images": np.concatenate([images[:2], shown_when_empty]),
            "labels": np.array([1, 2, 3, 4], np.int32),
        }, cut(updater.mesh))
        state = jax.tree.map(jnp.copy, updater.state)
        left.append(jax.device_get(updater.take(state, {"seed": np.uint32(0)}, [fed], 0.5, 0.0)))
    jax.tree.map(np.testing.assert_array_equal, *left)
    state, measured = left[1]
    assert measured.finite and measured.means["accuracy"] in (0.0, 0.5, 1.0)
    assert distance(state.params, jax.device_get(updater.state.params)) > 1e-3


def test_an_update_that_breaks_down_says_so():
    updater = prepare(with_model("support.foreign_models.Regression", {}))
    _, batches = inputs(updater, 48)
    _, measured = updater.take(
        updater.state, training_set(updater), batches, float("inf"), 0.9)
    assert np.isfinite(measured.loss) and not measured.finite


def test_a_single_parameter_that_is_not_finite_is_noticed_wherever_it_is():
    """Also where two of one shape go to opposite infinities."""
    updater = prepare(conv_net())
    resident, batches = training_set(updater), inputs(updater, 48)[1]
    start, structure = jax.tree.flatten(jax.device_get(updater.state))
    trained = len(jax.tree.leaves(updater.state[:2]))
    shapes = [leaf.shape for leaf in start]
    for at in range(trained, len(start)):  # the accumulator's: the loss is from before it is used
        spoilt = [np.array(leaf) for leaf in start]
        spoilt[at].flat[-1] = np.inf
        twin = next((other for other in range(trained, len(start))
                     if other != at and shapes[other] == shapes[at]), None)
        if twin:
            spoilt[twin].flat[-1] = -np.inf
        state = place(jax.tree.unflatten(structure, spoilt), replicated(updater.mesh))
        _, measured = updater.take(state, resident, batches, 0.1, 0.9)
        assert np.isfinite(measured.loss) and not measured.finite, (shapes[at], twin)
