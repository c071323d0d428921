"""ResNet against the literature's counts and a forward pass written in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bigbatch.models.resnet import ResNet, patch_kernel, patch_stem, pick_and_project, project
from bigbatch.update import network
from tests.support.network_checks import (
    GHOST,
    abstract,
    check_types,
    count,
    count_in_norms,
    forward_macs,
    gradient_of_one_update,
    keys,
    random_state,
    small_config,
)
from tests.support.updates import prepare

PATH = "bigbatch.models.resnet.ResNet"


# --- the form ------------------------------------------------------------------------------------
@pytest.mark.parametrize(("depth", "parameters"), [
    (18, 11_689_512), (34, 21_797_672), (50, 25_557_032), (101, 44_549_160), (152, 60_192_808),
])
def test_the_parameters_are_the_literatures(depth, parameters):
    assert count(abstract(ResNet, depth=depth)) == parameters


def test_the_arithmetic_of_a_forward_pass_is_4_089_billion_multiplications():
    assert round(forward_macs(abstract(ResNet), 224) / 1e9, 3) == 4.089


# --- against NumPy -------------------------------------------------------------------------------
def convolve(x, kernel, stride):
    size = len(kernel)
    x = np.pad(x, ((0, 0), *2 * [(size // 2, size // 2)], (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), (1, 2))
    return np.einsum("bijckl,klcf->bijf", windows[:, ::stride, ::stride], kernel, optimize=True)


def normalise(x, layer, train):
    """By ghost batches of GHOST in training, else by the running statistics."""
    mean, var = layer.mean[...], layer.var[...]
    if train:
        ghosts = x.reshape(-1, GHOST * x[0].size // x.shape[-1], x.shape[-1])
        mean, var = (
            np.repeat(statistic, GHOST, axis=0)[:, None, None]
            for statistic in (ghosts.mean(axis=1), ghosts.var(axis=1))
        )
    return (x - mean) / np.sqrt(var + 1e-5) * layer.scale[...] + layer.bias[...]


def reference(module, depth, images, train, stride_on):
    """ResNet's logits; `stride_on` is which convolution of a bottleneck has the stride."""
    def unit(x, conv, norm, stride):
        return normalise(convolve(x, np.asarray(conv.kernel[...]), stride), norm, train)

    x = np.maximum(unit(images, module.conv, module.norm, 2), 0)
    x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), (1, 2))
    x = windows[:, ::2, ::2].max(axis=(-2, -1))
    counts = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3)}[depth]
    blocks = iter(module.blocks)
    for group, many in enumerate(counts):
        for place in range(many):
            block = next(blocks)
            stride = 2 if group and not place else 1
            y = x
            for index, (conv, norm) in enumerate(zip(block.convs, block.norms, strict=True)):
                y = y if index == 0 else np.maximum(y, 0)
                y = unit(y, conv, norm, stride if index == stride_on else 1)
            if block.project is not None:
                x = unit(x, block.project, block.project_norm, stride)
            x = np.maximum(x + y, 0)
    assert next(blocks, None) is None
    return x.mean(axis=(1, 2)) @ module.head.kernel[...] + module.head.bias[...]


@pytest.mark.parametrize(("depth", "stride_on", "size", "train"), [
    (18, 0, (64, 64), False), (50, 1, (71, 50), True),
])
def test_logits_equal_a_numpy_reference(depth, stride_on, size, train):
    """In evaluation at an even size, in training at an odd one, in float64.

    The stride is on the first convolution of ResNet-18's blocks, on the 3x3 of a bottleneck
    (version 1.5); on a bottleneck's first (version 1) the logits are others.
    """
    jax.config.update("jax_enable_x64", True)
    module = random_state(abstract(ResNet, 7, "float64", depth=depth, width=4))
    graph, state = nnx.split(module)
    images = np.random.default_rng(6).normal(size=(2 * GHOST, *size, 3))

    @jax.jit
    def run(state, images):
        return nnx.merge(graph, state, copy=True)(images, train, keys(2 * GHOST))

    expected = reference(module, depth, images, train, stride_on)
    np.testing.assert_allclose(run(state, images), expected, rtol=1e-9, atol=1e-9)
    if depth == 50:
        version_1 = reference(module, depth, images, train, stride_on=0)
        assert np.abs(version_1 - expected).max() > 0.01, "the test could not tell them apart"


# --- where it begins -----------------------------------------------------------------------------
@pytest.fixture(scope="module")
def built():
    """A small network by its config, with its state before the first update."""
    return prepare(small_config(PATH, 32, depth=18, width=8), devices=2)


def test_initial_values_are_goyals(built):
    """Convolutions N(0, 2 / fan-out), the dense layer N(0, 0.01^2), a block's last gamma 0."""
    convolutions = 0
    for path, values in jax.tree_util.tree_leaves_with_path(built.state.params):
        values = np.asarray(values)
        names = [getattr(part, "key", None) for part in path]
        if names[-1] == "bias":
            assert not values.any(), names
        elif names[0] == "head":
            np.testing.assert_allclose(values.std(), 0.01, rtol=0.1)
        elif names[-1] == "kernel":
            fan_out = np.prod(values.shape[:-2]) * values.shape[-1]
            error = 5 / np.sqrt(2 * values.size)  # 5 standard errors
            np.testing.assert_allclose(values.std() / np.sqrt(2 / fan_out), 1, atol=error,
                                       err_msg=names)
            assert np.abs(values).max() > 2.4 * values.std() or values.size < 500, \
                f"{names} is cut off, which a plain normal is not"
            convolutions += 1
        else:
            last = names[-3:-1] == ["norms", 1]
            np.testing.assert_array_equal(values, 0 if last else 1, err_msg=names)
    assert convolutions == 20


@pytest.mark.parametrize(("depth", "convolutions"), [(18, 2), (50, 3)])
def test_at_first_every_block_is_its_shortcut(depth, convolutions):
    """relu(shortcut): of the input where its shape stays, else of its projection."""
    @jax.jit  # which computes only what is asked for
    def initial_norms():
        module = ResNet(7, jnp.float32, nnx.Rngs(0), ghost_size=GHOST, depth=depth, width=4)
        return [[(norm.scale[...], norm.bias[...]) for norm in block.norms]
                for block in module.blocks]

    module = random_state(abstract(ResNet, depth=depth, width=4))
    for place, norms in enumerate(initial_norms()):
        starts = [scale.mean() for scale, _ in norms]
        assert starts == [1] * (convolutions - 1) + [0], f"block {place}: gammas are {starts}"
        if place not in (0, 1, 4, 7):
            continue
        block = module.blocks[place]
        for norm, (scale, bias) in zip(block.norms, norms, strict=True):
            norm.scale[...], norm.bias[...] = scale, bias
            norm.mean[...] = jnp.zeros_like(norm.mean[...])
        inputs = np.random.default_rng(7).normal(size=(GHOST, 8, 8, block.convs[0].in_features))
        shortcut = inputs
        if block.project is not None:
            kernel = np.asarray(block.project.kernel[...])
            stride = block.project.strides
            shortcut = normalise(convolve(inputs, kernel, stride), block.project_norm, False)
        outputs = jax.jit(lambda x, block=block: block(x, False))(inputs.astype(np.float32))
        np.testing.assert_allclose(outputs, np.maximum(shortcut, 0), rtol=1e-4, atol=1e-4)


# --- a strided shortcut on a TPU ------------------------------------------------------------------
@pytest.mark.parametrize("size", [(8, 8), (7, 4)])
def test_picking_pixels_and_projecting_them_is_the_strided_convolution(size):
    """Values and gradients, in float64, at even and odd sizes."""
    jax.config.update("jax_enable_x64", True)
    random = np.random.default_rng(6)
    conv = nnx.Conv(3, 5, (1, 1), strides=2, padding=0, use_bias=False, dtype=jnp.float64,
                    param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    graph, kernel = nnx.split(conv)
    kernel = jax.tree.map(lambda leaf: random.normal(size=leaf.shape), kernel)
    images = random.normal(size=(2, *size, 3))

    def values_and_gradients(form):
        outputs, backwards = jax.vjp(
            lambda images, kernel: form(images, conv=nnx.merge(graph, kernel)), images, kernel)
        slopes = jnp.cos(jnp.arange(outputs.size)).reshape(outputs.shape)
        return jax.tree.leaves((outputs, backwards(slopes)))

    def strided(images, conv):
        return conv(images)

    both = zip(values_and_gradients(pick_and_project), values_and_gradients(strided), strict=True)
    for one, other in both:
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-12)


def test_only_a_tpus_program_picks_pixels():
    """The gradient of a strided convolution multiplies by zeros between pixels."""
    conv = nnx.Conv(3, 5, (1, 1), strides=2, padding=0, rngs=nnx.Rngs(0))
    traced = jax.jit(jax.grad(lambda x: project(x, conv).sum())).trace(jnp.ones((2, 8, 8, 3)))
    dilated = {platform: "lhs_dilate = [2, 2]" in traced.lower(
        lowering_platforms=(platform,)).as_text() for platform in ("tpu", "cpu", "cuda")}
    assert dilated == {"tpu": False, "cpu": True, "cuda": True}


# --- the stem by patches -------------------------------------------------------------------------
@pytest.mark.parametrize("size", [(8, 8), (64, 16), (9, 12), (7, 7), (1, 2)])
def test_the_stem_by_patches_equals_the_plain_one(size):
    """Values and gradients of the 7x7 convolution, in float64, at even and odd sizes."""
    jax.config.update("jax_enable_x64", True)
    random = np.random.default_rng(8)
    images, kernel = random.normal(size=(2, *size, 3)), random.normal(size=(7, 7, 3, 5))
    assert patch_kernel(jnp.asarray(kernel)).shape == (4, 4, 12, 5)

    def plain(images, kernel):
        return jax.lax.conv_general_dilated(
            images, kernel, (2, 2), ((3, 3), (3, 3)), dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    def values_and_gradients(stem):
        outputs, backwards = jax.vjp(stem, images, kernel)
        return outputs, *backwards(jnp.cos(jnp.arange(outputs.size)).reshape(outputs.shape))

    own = values_and_gradients(patch_stem)
    np.testing.assert_allclose(own[0], convolve(images, kernel, 2), rtol=1e-12, atol=1e-12)
    for one, other in zip(own, values_and_gradients(plain), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-11, atol=1e-11)


def test_the_stem_by_patches_changes_no_parameter_and_no_logit():
    jax.config.update("jax_enable_x64", True)
    images = jnp.asarray(np.random.default_rng(9).normal(size=(GHOST, 45, 32, 3)))
    trees, logits = [], []
    for patches in (False, True):
        module = random_state(abstract(
            ResNet, 7, "float64", depth=18, width=4, space_to_depth=patches
        ))
        graph, state = nnx.split(module)

        def run(state, graph=graph):
            return nnx.merge(graph, state)(images, False, keys(GHOST))

        convolutions = [
            equation.invars[1].aval.shape for equation in jax.make_jaxpr(run)(state).eqns
            if equation.primitive.name == "conv_general_dilated"
        ]
        assert convolutions[0] == ((4, 4, 12, 4) if patches else (7, 7, 3, 4))
        trees.append(jax.tree.map(jnp.shape, nnx.to_pure_dict(state)))
        logits.append(jax.jit(run)(state))
    assert trees[0] == trees[1]
    np.testing.assert_allclose(logits[1], logits[0], rtol=1e-10, atol=1e-10)


# --- what it computes in, and training -----------------------------------------------------------
def test_bfloat16_computes_and_float32_keeps():
    check_types(ResNet, 64, depth=18, width=8, space_to_depth=True)


def test_a_real_update_reaches_every_parameter_that_zero_gammas_let_through(built):
    """At first a block's branch has gamma 0 behind it: of it only that layer has a gradient."""
    gradient = gradient_of_one_update(built)
    assert jax.tree.structure(gradient) == jax.tree.structure(built.state.params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        names = [part.key for part in path]
        shut = "convs" in names or names[-3:-1] == ["norms", 0]
        assert np.isfinite(leaf).all() and leaf.any() != shut, names


def test_weight_decay_without_norms_is_goyals(built):
    """On convolutions and the dense layer, not on the scales and biases of normalisation."""
    for path, in_norm in jax.tree_util.tree_leaves_with_path(built.net.in_norm):
        names = [part.key for part in path]
        assert in_norm == (names[-1] != "kernel" and names[0] != "head"), names
    statistics = sum(leaf.size for leaf in jax.tree.leaves(built.state.batch_stats))
    assert count_in_norms(built) == statistics


@pytest.mark.parametrize(("arguments", "message"), [
    ({"depth": 20}, "model.depth is 20; a ResNet's is 18, 34, 50, 101, 152"),
    ({"width": 0}, "model.width is 0; it must be 1 or more"),
    ({"depth": 18, "channels": 1}, "model.channels is 1, but the images have 3"),
])
def test_a_network_that_cannot_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        network.build(small_config(PATH, 32, **arguments))
