"""Ghost batch normalisation: against Flax's BatchNorm, and statistics that count examples."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree

from bigbatch.models.normalization import (
    GhostBatchNorm,
    fold_weights,
    means_by_one_sum,
    means_by_two_sums,
)

FEATURES, GHOST = 3, 16


@pytest.fixture(autouse=True)
def float64(float32_again):
    jax.config.update("jax_enable_x64", True)


def layer(**keywords):
    keywords = {"ghost_size": GHOST, "dtype": jnp.float64, "rngs": nnx.Rngs(0), **keywords}
    return GhostBatchNorm(FEATURES, **keywords)


def activations(seed, examples=GHOST):
    """(examples, 4, 4, features) with a mean and a spread of their own in each feature."""
    draws = np.random.default_rng(seed).normal(size=(examples, 4, 4, FEATURES))
    return jnp.asarray(draws * [0.5, 1.0, 4.0] + [-2.0, 0.0, 3.0])


def folded(running, rows, decay):
    """One ghost batch after the other, as the definition has it."""
    for row in rows:
        running = decay * running + (1 - decay) * row
    return running


def test_one_ghost_batch_is_flaxs_batch_norm():
    """Outputs, gradients, and over several updates the running statistics evaluation uses."""
    decay, scale, bias = 0.8, jnp.array([1.5, 0.7, -2.0]), jnp.array([0.1, -1.0, 0.4])
    ours = layer(decay=decay)
    # What Flax calls momentum is what remains of a running statistic; its variance is biased too.
    flaxs = nnx.BatchNorm(FEATURES, momentum=decay, epsilon=1e-5, dtype=jnp.float64,
                          param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    flaxs.mean.set_value(jnp.zeros(FEATURES))  # made as float32 whatever the type
    flaxs.var.set_value(jnp.ones(FEATURES))
    direction = activations(99)

    def outputs(module, mode, inputs, scale, bias):
        module = nnx.clone(module)
        module.scale.set_value(scale)
        module.bias.set_value(bias)
        return module(inputs, **mode)

    def gradients(module, mode, *variables):
        def objective(*variables):
            return jnp.sum(direction * outputs(module, mode, *variables) ** 2)
        return jax.grad(objective, (0, 1, 2))(*variables)

    def compiled(of):
        """Of our layer and of Flax's, which are constants: what they hold matters to neither."""
        return [jax.jit(partial(of, ours, {"train": True})),
                jax.jit(partial(of, flaxs, {"use_running_average": False}))]

    both = compiled(outputs), compiled(gradients)
    running = {"mean": jnp.zeros(FEATURES), "var": jnp.ones(FEATURES)}
    for seed in range(4):
        variables = activations(seed), scale, bias
        for pair in both:
            mine, theirs = (ravel_pytree(of(*variables))[0] for of in pair)
            np.testing.assert_allclose(mine, theirs, rtol=1e-11, atol=1e-11 * np.abs(theirs).max())
        trained = nnx.clone(ours)
        trained(variables[0], train=True)
        flaxs(variables[0], use_running_average=False)
        for name in running:
            rows = getattr(trained, name)[...]
            assert rows.shape == (1, FEATURES)
            running[name] = folded(running[name], rows, decay)
            np.testing.assert_allclose(
                running[name], getattr(flaxs, name)[...], rtol=1e-12, err_msg=f"running {name}")

    for name, value in running.items():
        getattr(ours, name).set_value(value)
    inputs = activations(7, 5)  # evaluation takes any number of examples
    np.testing.assert_allclose(
        ours(inputs, train=False), flaxs(inputs, use_running_average=True), rtol=1e-12, atol=1e-12
    )


def test_each_ghost_batch_is_normalised_by_itself():
    inputs = activations(1, 3 * GHOST)
    together = layer()
    outputs = together(inputs, train=True)
    for ghost in range(3):
        alone = layer()
        part = slice(ghost * GHOST, (ghost + 1) * GHOST)
        np.testing.assert_allclose(
            outputs[part], alone(inputs[part], train=True), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(together.mean[...][ghost], alone.mean[...][0], rtol=1e-12)
        np.testing.assert_allclose(together.var[...][ghost], alone.var[...][0], rtol=1e-12)
    assert not np.allclose(together.mean[...][0], together.mean[...][1], rtol=1e-3)


@pytest.mark.parametrize("shape", [(6, 4, 5, 3), (4, 3)])
def test_a_tpus_one_sum_is_the_two_of_others(shape):
    x = np.random.default_rng(5).normal(size=shape)
    expected = x.reshape(len(x) // 2, -1, 3).mean(axis=1)
    for means in (means_by_one_sum, means_by_two_sums):
        np.testing.assert_allclose(means(jnp.asarray(x), ghost_size=2), expected, rtol=1e-12)


@pytest.mark.parametrize("ghosts", [1, 2, 5, 64])
@pytest.mark.parametrize("decay", [0.9, 0.9997])
def test_weights_fold_ghost_batches_as_if_one_by_one(ghosts, decay):
    """r <- d^k r + sum_i (1-d) d^(k-1-i) s_i; empty slots weigh nothing, and order matters."""
    rows = np.random.default_rng(ghosts).normal(size=(ghosts, FEATURES)) + 5.0
    running = np.array([1.0, -2.0, 30.0])
    after = np.arange(ghosts)[::-1]
    weights = fold_weights(jnp.asarray(after), decay, jnp.float64)
    np.testing.assert_allclose(
        decay**ghosts * running + weights @ rows, folded(running, rows, decay), rtol=1e-12)
    if ghosts > 1:
        backwards = decay**ghosts * running + weights @ rows[::-1]
        assert np.abs(backwards - folded(running, rows, decay)).max() > 1e-7

    # Dealt out with empty slots in between, as a device sees them.
    slots = np.insert(after, [0, ghosts // 2, ghosts], -1)
    with_empty = fold_weights(jnp.asarray(slots), decay, jnp.float64)
    np.testing.assert_array_equal(with_empty[slots < 0], 0.0)
    np.testing.assert_array_equal(with_empty[slots >= 0], weights)


def test_float32_weights_keep_their_digits_over_many_ghost_batches():
    """An ImageNet epoch of ghost batches in one update; a rounded d would spoil d^k."""
    after = np.arange(40_000)
    for decay in (0.9, 0.9997):
        exact = (1 - decay) * decay ** after.astype(np.float64)
        weights = fold_weights(jnp.asarray(after), decay, jnp.float32)
        assert weights.dtype == jnp.float32
        seen = exact > 1e-6 * exact[0]
        np.testing.assert_allclose(np.asarray(weights)[seen], exact[seen], rtol=3e-6)


def test_sums_are_taken_in_float32_for_bfloat16():
    """Of 4 096 pixels a bfloat16 sum would keep two digits."""
    inputs = jnp.abs(activations(3, 256)).astype(jnp.bfloat16)
    narrow = layer(ghost_size=256, dtype=jnp.bfloat16)
    outputs = narrow(inputs, train=True)
    assert outputs.dtype == jnp.bfloat16
    exact = np.asarray(inputs, np.float64).reshape(-1, FEATURES)
    for name, expected in (("mean", exact.mean(0)), ("var", exact.var(0))):
        found = getattr(narrow, name)[...]
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found[0], expected, rtol=1e-5, err_msg=name)
    assert narrow.bias[...].dtype == narrow.scale[...].dtype == jnp.float32


def test_constant_features_stay_finite():
    """E[x^2] - E[x]^2 may come out below zero, and far enough to make the root a nan."""
    values = jnp.asarray(np.random.default_rng(0).uniform(0, 1e3, (200, 1, 1, 1)), jnp.float32)
    inputs = jnp.broadcast_to(values, (200, 7, 7, FEATURES))
    constant = layer(dtype=jnp.float32, ghost_size=1)
    assert np.isfinite(constant(inputs, train=True)).all()
    variances = np.asarray(constant.var[...])
    assert (variances >= 0).all()


def test_without_scale_there_is_only_a_bias():
    plain = layer(use_scale=False)
    assert list(nnx.to_pure_dict(nnx.state(plain, nnx.Param))) == ["bias"]
    np.testing.assert_allclose(
        plain(activations(0), train=True), layer()(activations(0), train=True), rtol=1e-12)


def test_the_scale_begins_as_told():
    np.testing.assert_array_equal(layer(scale_init=nnx.initializers.zeros).scale[...], 0.0)


def test_what_cannot_be_normalised_is_refused():
    with pytest.raises(ValueError, match="40 examples, no whole number of ghost batches of 16"):
        layer()(activations(0, 40), train=True)
    for decay in (0.0, 1.0, -0.1):
        with pytest.raises(ValueError, match=f"decay is {decay}; it must lie between 0 and 1"):
            layer(decay=decay)
