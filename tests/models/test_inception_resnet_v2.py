"""Inception-ResNet-V2 against the literature's counts and, number by number, Keras's network."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bigbatch.models.inception_resnet_v2 import (
    STAGES,
    ConvBN,
    InceptionResNetV2,
    _average_pool,
)
from bigbatch.models.normalization import GhostBatchNorm
from bigbatch.update import network
from tests.support.network_checks import (
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

PATH = "bigbatch.models.inception_resnet_v2.InceptionResNetV2"
# One block of each kind, 1/16 of the width: 2 to 130 features. The smallest with that head.
SMALL = {"blocks": (1, 1, 1), "divisor": 16}
SMALL_AUXILIARY = {**SMALL, "auxiliary_weight": 0.3, "image_size": 107}

TABLE = {  # stage: parameters without scale, shape of its output for an image of 299x299
    "stem": (172_272, (35, 35, 192)),
    "mixed_5b": (267_792, (35, 35, 320)),
    "block35": (1_229_280, (35, 35, 320)),
    "mixed_6a": (2_663_680, (17, 17, 1088)),
    "block17": (22_522_240, (17, 17, 1088)),
    "mixed_7a": (3_878_912, (8, 8, 2080)),
    "block8": (20_345_600, (8, 8, 2080)),
    "conv_7b": (3_196_416, (8, 8, 1536)),
}


@pytest.fixture(scope="module")
def full():
    """The network of 1000 classes with the auxiliary head, without values."""
    return abstract(InceptionResNetV2, auxiliary_weight=0.4)


@pytest.fixture(scope="module")
def built():
    """A small network by its config, with its state before the first update."""
    return prepare(small_config(PATH, 107, bn_decay=0.9, **SMALL_AUXILIARY), devices=2)


def run_stages(module, images, train=False):
    outputs, x = {}, images
    for name in STAGES:
        outputs[name] = x = getattr(module, name)(x, train)
    return outputs


# --- the form ------------------------------------------------------------------------------------
def test_the_parameters_are_the_literatures(full):
    for name, (parameters, _) in TABLE.items():
        assert count(getattr(full, name)) == parameters, name
    assert count(full.head) == 1_537_000
    assert count(full.auxiliary) == 3_366_760
    assert count(full) - 3_366_760 == 55_813_192
    statistics = count(full, nnx.BatchStat) - count(full.auxiliary, nnx.BatchStat)
    assert 55_813_192 + statistics == 55_873_736
    # A scale for each bias of a normalisation layer, all but the auxiliary head's 128 + 768.
    norms = [part for _, part in nnx.iter_modules(full) if isinstance(part, GhostBatchNorm)]
    biases = sum(part.bias.size for part in norms) - 128 - 768
    assert 55_813_192 + biases == 55_843_464
    assert {(part.epsilon, part.mean.get_metadata()["decay"]) for part in norms} == {(1e-3, 0.9997)}


def test_scale_adds_one_parameter_a_bias_of_normalisation():
    plain, scaled = (
        abstract(InceptionResNetV2, bn_scale=scale, **SMALL) for scale in (False, True)
    )
    assert count(scaled) - count(plain) == count(plain, nnx.BatchStat) // 2


def test_every_stage_has_the_literatures_shape(full):
    graph, state = nnx.split(full)
    shapes = jax.eval_shape(
        lambda state, images: run_stages(nnx.merge(graph, state), images),
        state, jax.ShapeDtypeStruct((2, 299, 299, 3), jnp.float32),
    )
    assert {name: x.shape for name, x in shapes.items()} == {
        name: (2, *shape) for name, (_, shape) in TABLE.items()
    }


def test_the_arithmetic_of_a_forward_pass_is_13_16_billion_multiplications(full):
    assert round(forward_macs(full, 299) / 1e9, 2) == 13.16


def test_a_divisor_scales_every_width_and_blocks_set_the_depth():
    small = abstract(InceptionResNetV2, auxiliary_weight=0.4, divisor=8, blocks=(2, 3, 1))
    widths = [small.stem, small.mixed_5b, small.mixed_6a, small.mixed_7a, small.conv_7b,
              small.auxiliary.convolutions]
    assert [stage.outputs for stage in widths] == [24, 40, 136, 260, 192, 96]
    assert [len(getattr(small, name).blocks) for name in ("block35", "block17", "block8")] == \
        [2, 3, 1]
    last = [block.activate for block in small.block8.blocks]
    assert last == [False], "the last block8 has no ReLU, also where it is the only one"


def test_average_pooling_leaves_the_padding_out_of_the_count():
    np.testing.assert_allclose(_average_pool(jnp.ones((1, 4, 5, 2)), True), 1.0, rtol=1e-6)


@pytest.fixture(scope="module")
def with_two_block8():
    return random_state(abstract(InceptionResNetV2, divisor=16, blocks=(1, 1, 2)))


@pytest.mark.parametrize(("name", "place", "scale"), [
    ("block35", 0, 0.17), ("block17", 0, 0.1), ("block8", 0, 0.2), ("block8", 1, 1.0),
])
def test_a_residual_block_adds_its_scaled_branches(with_two_block8, name, place, scale):
    """With `up` a constant c, a block is relu(x + scale c); the last block8 has no ReLU."""
    block = getattr(with_two_block8, name).blocks[place]
    block.up.kernel[...] = jnp.zeros_like(block.up.kernel[...])
    block.up.bias[...] = constant = jnp.arange(len(block.up.bias[...])) % 3.0
    x = jax.random.normal(jax.random.key(1), (1, 4, 4, len(constant)))
    expected = x + scale * constant
    if (name, place) != ("block8", 1):
        expected = jnp.maximum(expected, 0)
    outputs = jax.jit(lambda x: block(x, False))(x)
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-6)


def test_weights_begin_uniform_by_glorot_and_biases_at_zero(built):
    large = 0
    for path, values in jax.tree_util.tree_leaves_with_path(built.state.params):
        values = np.asarray(values)
        if path[-1].key == "bias":
            assert not values.any(), path
            continue
        field = np.prod(values.shape[:-2])
        limit = np.sqrt(6 / (field * (values.shape[-2] + values.shape[-1])))
        assert np.abs(values).max() <= limit, path
        if values.size > 1000:
            large += 1
            np.testing.assert_allclose(values.std(), limit / np.sqrt(3), rtol=0.05, err_msg=path)
    assert large > 5


# --- against Keras -------------------------------------------------------------------------------
@pytest.fixture
def keras(tmp_path, monkeypatch):
    """Keras on JAX, in float64 (but its normalisation computes in float32 all the same).

    Weights begin at zero: they are replaced, and drawing them takes half a minute.
    """
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    keras = pytest.importorskip("keras", reason="needs the keras package as the reference")
    if keras.backend.backend() != "jax":
        pytest.skip(f"keras was loaded with the backend {keras.backend.backend()}, not jax")
    monkeypatch.setattr(keras.initializers.VarianceScaling, "__call__",
                        lambda self, shape, dtype=None: np.zeros(shape, dtype))
    jax.config.update("jax_enable_x64", True)
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    yield keras
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")


def numbered(layers, kind):
    """The layers Keras named by a running number, in the order they were made."""
    found = [layer for layer in layers if re.fullmatch(rf"{kind}(_\d+)?", layer.name)]
    return sorted(found, key=lambda layer: int((layer.name.split(kind)[1] or "_0")[1:]))


def copy_weights(module, network):
    """Sets every variable of Keras's network to ours."""
    layers = {layer.name: layer for layer in network.layers}
    convolutions = iter(numbered(network.layers, "conv2d"))
    norms = iter(numbered(network.layers, "batch_normalization"))

    def copy(unit, conv, norm):
        conv.set_weights([np.asarray(unit.conv.kernel[...])])
        norm.set_weights([np.asarray(x[...]) for x in (unit.norm.bias, unit.norm.mean,
                                                       unit.norm.var)])

    def copy_mixed(mixed):
        for unit in (layer for branch in mixed.branches for layer in branch):
            if isinstance(unit, ConvBN):
                copy(unit, next(convolutions), next(norms))

    for name in STAGES[:-1]:
        stage = getattr(module, name)
        if not name.startswith("block"):
            copy_mixed(stage)
            continue
        for place, block in enumerate(stage.blocks, start=1):
            copy_mixed(block.mixed)
            layers[f"{name}_{place}_conv"].set_weights(
                [np.asarray(x[...]) for x in (block.up.kernel, block.up.bias)]
            )
    copy(module.conv_7b.branches[0][0], layers["conv_7b"], layers["conv_7b_bn"])
    layers["predictions"].set_weights(
        [np.asarray(x[...]) for x in (module.head.kernel, module.head.bias)]
    )
    assert (next(convolutions, None), next(norms, None)) == (None, None)


@pytest.mark.slow
def test_logits_and_every_stage_equal_those_of_keras(keras):
    """Random weights, biases and statistics copied over; two random images of 139x139.

    What is compared is the difference over the standard deviation over images: with the numbers of
    a fresh network all images look the same to it, and any two networks would agree.
    """
    network = keras.applications.InceptionResNetV2(
        weights=None, classifier_activation=None, input_shape=(139, 139, 3))
    module = random_state(abstract(InceptionResNetV2, dtype="float64"))
    copy_weights(module, network)
    ends = [numbered(network.layers, "max_pooling2d")[1].output] + [
        network.get_layer(name).output
        for name in ("mixed_5b", "block35_10_ac", "mixed_6a", "block17_20_ac", "mixed_7a")
    ] + [network.get_layer("conv_7b").input, network.get_layer("conv_7b_ac").output, network.output]
    probe = keras.Model(network.input, ends)
    # 4x4 patches of random colours: pooled noise would look the same whatever the image.
    colours = np.random.default_rng(4).uniform(-1, 1, (2, 4, 4, 3))
    images = colours.repeat(35, axis=1).repeat(35, axis=2)[:, :139, :139]

    variables = [
        [variable.value for variable in group]
        for group in (probe.trainable_variables, probe.non_trainable_variables)
    ]
    theirs, _ = jax.jit(
        lambda *arrays: probe.stateless_call(*arrays, training=False)
    )(*variables, images)

    graph, state = nnx.split(module)

    def forward(state, images):
        module = nnx.merge(graph, state)
        return [*run_stages(module, images).values(), module(images, False, keys(len(images)))]

    for name, own, other in zip(
        (*STAGES, "logits"), jax.jit(forward)(state, images), theirs, strict=True
    ):
        assert (own.shape, own.dtype) == (other.shape, other.dtype), name
        deviation = np.sqrt(np.mean(np.std(other, axis=0) ** 2))
        assert deviation > 0.01 * np.sqrt(np.mean(other**2)), f"{name}: the images look the same"
        worst = np.abs(own - other).max() / deviation
        print(f"{name}: off by {worst:.1e} of the deviation over images at most")
        assert worst < 1e-4, f"{name} is off by {worst:.1e} standard deviations over images"


# --- the heads -----------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def training_run():
    """A small network in training, and what its parts make of the same images.

    Its classes are its 96 features: the last dense layer is the identity.
    """
    module = random_state(abstract(InceptionResNetV2, 1536 // 16, **SMALL_AUXILIARY))
    module.head.kernel[...] = jnp.eye(1536 // 16)
    module.head.bias[...] = jnp.zeros(1536 // 16)
    graph, state = nnx.split(module)

    @jax.jit
    def run(images, keys):
        outputs = nnx.merge(graph, state, copy=True)(images, True, keys)
        module = nnx.merge(graph, state, copy=True)
        stages = run_stages(module, images, True)
        return outputs, stages["conv_7b"].mean((1, 2)), module.auxiliary(stages["block17"], True)

    images = jax.random.normal(jax.random.key(2), (8, 107, 107, 3))
    return module, images, run


def test_dropout_keeps_80_percent_of_the_pooled_features(training_run):
    _, images, run = training_run
    (dropped, _), whole, _ = jax.tree.map(np.asarray, run(images, keys(8)))
    kept = dropped != 0
    np.testing.assert_allclose(dropped[kept], whole[kept] / 0.8, rtol=1e-4, atol=1e-5)
    assert abs(kept[whole != 0].mean() - 0.8) < 0.06
    (again, _), *_ = run(images, keys(8, seed=1))
    assert ((again != 0) != kept).any(), "the mask does not follow from the examples' keys"


def test_auxiliary_logits_come_behind_block17_and_only_in_training(training_run):
    module, images, run = training_run
    (logits, [(weight, auxiliary)]), _, expected = run(images, keys(8))
    assert (logits.shape, auxiliary.shape) == ((8, 96), (8, 96))
    np.testing.assert_allclose(weight, 0.3, rtol=1e-6)
    np.testing.assert_allclose(auxiliary, expected, rtol=1e-4, atol=1e-5)
    # Evaluated at another size too: the auxiliary head is not asked.
    graph, state = nnx.split(random_state(module))
    for size in ((107, 107), (90, 80)):
        outputs = jax.eval_shape(
            lambda images: nnx.merge(graph, state)(images, False, keys(8)),
            jax.ShapeDtypeStruct((8, *size, 3), jnp.float32),
        )
        assert outputs.shape == (8, 96)


@pytest.mark.parametrize(("image_size", "map_side"), [(107, 5), (155, 8), (203, 11)])
def test_the_auxiliary_head_is_tf_slims(image_size, map_side):
    """Pool 5x5/3, 1x1 to 128, a convolution over the whole map to 768, dense; in NumPy."""
    module = random_state(abstract(
        InceptionResNetV2, 10, **{**SMALL_AUXILIARY, "image_size": image_size}
    ))
    head = module.auxiliary
    inputs = np.random.default_rng(5).normal(size=(4, map_side, map_side, 68)).astype(np.float32)

    starts = range(0, map_side - 4, 3)
    pooled = np.stack([
        np.stack([inputs[:, i:i + 5, j:j + 5].mean(axis=(1, 2)) for j in starts], axis=1)
        for i in starts
    ], axis=1)

    def norm(x, layer):
        x = (x - layer.mean[...]) / np.sqrt(layer.var[...] + 1e-3)
        return np.maximum(x + layer.bias[...], 0)

    first, second = head.convolutions.branches[0]
    y = norm(pooled @ first.conv.kernel[...][0, 0], first.norm)
    y = norm(np.einsum("bhwc,hwcf->bf", y, second.conv.kernel[...]), second.norm)
    assert y.shape == (4, 768 // 16)
    expected = y @ head.head.kernel[...] + head.head.bias[...]
    outputs = jax.jit(lambda inputs: head(inputs, False))(inputs)
    np.testing.assert_allclose(outputs, expected, rtol=1e-3, atol=1e-4)


# --- what it computes in, and training -----------------------------------------------------------
def test_bfloat16_computes_and_float32_keeps():
    check_types(InceptionResNetV2, 107, dropout_rate=0.0, **SMALL_AUXILIARY)


@pytest.mark.slow  # so does its training on photographs, and the gradient is Keras's
def test_a_real_update_reaches_every_parameter(built):
    gradient = gradient_of_one_update(built)
    assert jax.tree.structure(gradient) == jax.tree.structure(built.state.params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.isfinite(leaf).all() and leaf.any(), jax.tree_util.keystr(path)


def test_weight_decay_without_norms_is_tf_slims(built):
    """On convolutions and dense layers with their biases, not on the bias of a normalisation."""
    for path, in_norm in jax.tree_util.tree_leaves_with_path(built.net.in_norm):
        names = [part.key for part in path]
        assert in_norm == (names[-2:] == ["norm", "bias"]), names
    statistics = sum(leaf.size for leaf in jax.tree.leaves(built.state.batch_stats))
    assert count_in_norms(built) == statistics // 2


# --- what is refused -----------------------------------------------------------------------------
@pytest.mark.parametrize(("arguments", "message"), [
    ({"blocks": (10, 20)}, r"model.blocks is \(10, 20\); it must be three whole numbers"),
    ({"blocks": (10, 0, 10)}, r"model.blocks is \(10, 0, 10\)"),
    ({"divisor": 3}, "model.divisor is 3; .*1, 2, 4, 8, 16"),
    ({"auxiliary_weight": -0.4}, "model.auxiliary_weight is -0.4; it must be 0 or more"),
    ({"auxiliary_weight": 0.4, "image_size": 106}, "model.image_size is 106; .*107 or more"),
])
def test_a_network_that_cannot_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        abstract(InceptionResNetV2, **arguments)


def test_the_smallest_images_it_takes():
    graph, state = nnx.split(abstract(InceptionResNetV2, 10, **SMALL))

    def last_map(state, images):
        return run_stages(nnx.merge(graph, state), images)["conv_7b"]

    def logits(state, images):
        return nnx.merge(graph, state)(images, False, keys(1))

    def shape(function, height, width):
        images = jax.ShapeDtypeStruct((1, height, width, 3), jnp.float32)
        return jax.eval_shape(function, state, images).shape

    assert shape(last_map, 75, 75) == (1, 1, 1, 96)
    assert 0 in shape(last_map, 74, 75)
    assert shape(logits, 75, 75) == (1, 10)
    with pytest.raises(ValueError, match="images of 80x74; the smallest .* 75x75"):
        shape(logits, 80, 74)


def test_a_config_is_refused_before_anything_is_computed():
    with pytest.raises(ValueError, match="images of 64x64; the smallest .* 75x75"):
        network.build(small_config(PATH, 64, **SMALL))
    with pytest.raises(ValueError, match="model.channels is 1, but the images have 3"):
        network.build(small_config(PATH, 75, channels=1, **SMALL))
    with pytest.raises(ValueError, match="model.image_size is 107, but the images are 120x120"):
        network.build(small_config(PATH, 120, **SMALL_AUXILIARY))
