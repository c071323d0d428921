"""The Wide ResNet: the paper's sizes, and the network written out in plain JAX."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

from bigbatch.models import wide_resnet
from bigbatch.update import network
from bigbatch.update.update import init_state
from tests.support import plain_wide_resnet
from tests.support.configs import load, tiny


def cifar(depth=16, width=4):
    return load("cifar10", f"increase,model.depth={depth},model.width={width}")


def shapes(config):
    net = network.build(config)
    return net.params, net.batch_stats


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def test_wrn_16_4_has_the_papers_layers():
    params, batch_stats = shapes(cifar())
    assert count(params) == 2_748_890
    kernels = [params["conv"]["kernel"].shape]
    for _, block in sorted(params["blocks"].items()):
        kernels += [block[name]["kernel"].shape for name in ("conv1", "conv2", "project")
                    if name in block]
    assert kernels == [
        (3, 3, 3, 16),
        (3, 3, 16, 64), (3, 3, 64, 64), (1, 1, 16, 64), (3, 3, 64, 64), (3, 3, 64, 64),
        (3, 3, 64, 128), (3, 3, 128, 128), (1, 1, 64, 128), (3, 3, 128, 128), (3, 3, 128, 128),
        (3, 3, 128, 256), (3, 3, 256, 256), (1, 1, 128, 256), (3, 3, 256, 256), (3, 3, 256, 256),
    ]
    assert params["head"]["kernel"].shape == (256, 10) and params["head"]["bias"].shape == (10,)
    normed = 16 + 3 * 64 + 64 + 3 * 128 + 128 + 3 * 256 + 256
    assert count(params) == sum(map(math.prod, kernels)) + 2 * normed + 256 * 10 + 10
    assert count(batch_stats) == 2 * normed
    # No convolution has a bias.
    assert all("bias" not in block["conv1"] for block in params["blocks"].values())


@pytest.mark.parametrize(("depth", "width", "millions"), [(40, 1, 0.6), (16, 8, 11.0)])
def test_the_papers_other_sizes(depth, width, millions):
    """Zagoruyko & Komodakis, table 4."""
    assert round(count(shapes(cifar(depth, width))[0]) / 1e6, 1) == millions


def multiply_accumulates(jaxpr):
    """Of a program's convolutions and products, padding counted as if it were image."""
    total = 0
    for equation in jaxpr.eqns:
        for inner in jaxprs_in_params(equation.params):
            total += multiply_accumulates(inner)
        output = equation.outvars[0].aval
        if equation.primitive.name == "conv_general_dilated":
            kernel = equation.invars[1].aval
            total += output.size * kernel.size // output.shape[-1]
        if equation.primitive.name == "dot_general":
            total += output.size * equation.invars[0].aval.shape[-1]
    return total


def test_wrn_16_4_takes_as_many_multiplications_as_the_papers():
    """0.3926 GMAC for one image of 32x32: strides and sizes are where they should be."""
    net = network.build(cifar())
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    jaxpr = jax.make_jaxpr(lambda *arrays: net.apply(*arrays, False, None)[0])(
        *shapes(cifar()), images)
    assert multiply_accumulates(jaxpr.jaxpr) == pytest.approx(0.3926e9, rel=1e-4)


@pytest.mark.parametrize(("settings", "before"), [
    ((), 1), (("model.width=2",), 1),
    (("model.same_padding=True",), 0),  # version 0.1's
])
def test_it_is_the_network_written_out(settings, before):
    """In float64, in training and in evaluation; in the first group of width 1 nothing projects."""
    jax.config.update("jax_enable_x64", True)
    config = tiny("dtype=float64", *settings)
    net = network.build(config)
    params, batch_stats, *_ = init_state(config, net)
    assert ("project" in params["blocks"][0]) == ("model.width=2" in settings)
    draws = np.random.default_rng(0)

    def scattered(tree):
        """Away from where scales are 1 and biases 0."""
        return jax.tree.map(
            lambda leaf: leaf + 0.3 * jnp.abs(jnp.asarray(draws.normal(size=leaf.shape))), tree)

    params, batch_stats = scattered(params), scattered(batch_stats)
    images = jnp.asarray(draws.normal(size=(2 * config.ghost_size, 8, 8, 1)))
    apply, forward = jax.jit(net.apply, static_argnums=3), jax.jit(
        partial(plain_wide_resnet.forward, before=before))
    logits, rows = apply(params, batch_stats, images, True, None)
    for ghost in range(2):
        part = slice(ghost * config.ghost_size, (ghost + 1) * config.ghost_size)
        expected, statistics = forward(params, images[part])
        np.testing.assert_allclose(logits[part], expected, rtol=1e-10, atol=1e-11)
        for found, wanted in zip(plain_wide_resnet.in_order(rows), statistics, strict=True):
            for row, value in zip(found, wanted, strict=True):
                np.testing.assert_allclose(row[ghost], value, rtol=1e-10, atol=1e-12)

    logits, after = apply(params, batch_stats, images, False, None)
    running = plain_wide_resnet.in_order(batch_stats)
    expected, _ = forward(params, images, running)
    np.testing.assert_allclose(logits, expected, rtol=1e-10, atol=1e-11)
    jax.tree.map(np.testing.assert_array_equal, after, batch_stats)


def test_initialisation_is_he_normal_and_follows_the_seed():
    config = cifar(10, 2)
    net = network.build(config)

    def drawn(seed):
        config.seed = seed
        return init_state(config, net)

    params, batch_stats, *_ = state = drawn(0)
    for name in ("conv1", "conv2"):
        kernel = np.asarray(params["blocks"][2][name]["kernel"])
        fan_in = math.prod(kernel.shape[:3])
        assert kernel.std() * math.sqrt(fan_in / 2) == pytest.approx(1, abs=0.01)
        assert abs(kernel.mean()) * math.sqrt(fan_in / 2) < 0.01
        # A plain normal and not one cut off at two deviations: 4.6 % lie beyond.
        beyond = np.mean(np.abs(kernel) > 2 * math.sqrt(2 / fan_in))
        assert beyond == pytest.approx(0.0455, abs=0.003)
    norm = params["blocks"][1]["norm2"]
    assert (np.all(norm["scale"] == 1), np.all(norm["bias"] == 0)) == (True, True)
    assert np.all(params["head"]["bias"] == 0)
    assert np.all(batch_stats["norm"]["mean"] == 0) and np.all(batch_stats["norm"]["var"] == 1)

    jax.tree.map(np.testing.assert_array_equal, drawn(0), state)
    for seed in (1, 2**32 - 1):  # the largest there is
        other = drawn(seed).params["conv"]["kernel"]
        assert np.mean(other == params["conv"]["kernel"]) < 0.01


def test_dropout_is_between_the_convolutions_of_a_block():
    net = wide_resnet.WideResNet(
        10, jnp.float32, nnx.Rngs(0), ghost_size=16, depth=10, width=1, dropout_rate=0.5)
    block = net.blocks[0]
    # A second convolution that adds up the features, so that behind it all of them are the same
    # and what is dropped behind it would show.
    block.conv2.kernel.set_value(jnp.zeros((3, 3, 16, 16)).at[1, 1].set(1.0))
    inputs = jnp.asarray(np.random.default_rng(0).normal(size=(16, 8, 8, 16)), jnp.float32)
    call = nnx.jit(lambda block, keys: block(inputs, True, keys) - inputs)
    added = [np.asarray(call(block, jax.random.split(jax.random.key(seed), 16)))
             for seed in range(2)]
    for branch in added:
        np.testing.assert_allclose(branch, branch[..., :1].repeat(16, -1), atol=1e-4)
    assert np.abs(added[0] - added[1]).max() > 1.0


@pytest.mark.parametrize(("settings", "message"), [
    (("model.depth=12",), r"model.depth is 12; .* 6n \+ 4"),
    (("model.depth=4",), "model.depth is 4"),
    (("model.width=0",), "model.width is 0; it must be 1 or more"),
    (("model.channels=3",), "model.channels is 3, but the images have 1"),
    (("model.bn_decay=1.0",), "decay is 1.0; it must lie between 0 and 1"),
])
def test_sizes_that_are_none_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        network.build(tiny(*settings))
