"""A state split over devices: the rule, the same curve, the bytes that devices exchange."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from bigbatch.config import noise_layout
from bigbatch.job.devices import make_mesh
from bigbatch.mistake import Mistake
from bigbatch.models.blocks import Blocks
from bigbatch.models.normalization import GhostBatchNorm
from bigbatch.planning.compiled import collectives
from bigbatch.schedule.layout import ghosts_by_slot
from bigbatch.update import network, own_optimizer, sharding, update
from tests.support.configs import load
from tests.support.updates import NO_AUGMENTATION, distance, prepare, train, with_model
from tests.update.test_compiled_update import lowered

WIDTH = 24  # which 2, 3, 4 and 8 divide
OPTIMIZER = ("sharding.optimizer=true", "sharding.smallest=1")
PARAMETERS = ("sharding.parameters=true", "sharding.smallest=1")


class Layer(nnx.Module):
    """A residual layer; the running statistics of its norm come back out of its call."""

    def __init__(self, types, ghost_size, rngs):
        self.dense = nnx.Linear(WIDTH, WIDTH, use_bias=False, **types, rngs=rngs)
        self.norm = GhostBatchNorm(WIDTH, ghost_size=ghost_size, dtype=types["dtype"], rngs=rngs)

    def __call__(self, x, train):
        return x + nnx.relu(self.norm(self.dense(x), train))


class Stack(nnx.Module):
    """Two layers in a list of blocks, between layers outside of it."""

    def __init__(self, num_classes, dtype, rngs, *, ghost_size):
        types = {"dtype": dtype, "param_dtype": jnp.promote_types(dtype, jnp.float32)}
        self.first = nnx.Linear(64, WIDTH, **types, rngs=rngs)
        self.blocks = Blocks([Layer(types, ghost_size, rngs) for _ in range(2)])
        self.head = nnx.Linear(WIDTH, num_classes, **types, rngs=rngs)

    def __call__(self, images, train, keys):
        x = self.first(images.reshape(len(images), -1))
        for block in self.blocks.calls():
            x = block(x, train)
        return self.head(x)


def stack(*settings):
    """Twenty updates of 3, then 9 ghost batches, clipped and averaged."""
    return with_model(
        "update.test_sharding.Stack", {"ghost_size": 16}, "dtype=float64", "ema=0.9",
        "optimizer.clip_norm=0.5", "recipe.falls=((0.3,3),)", "limits.max_batch_size=144",
        *NO_AUGMENTATION, *settings)


def adamw(*settings):
    """A transformer under AdamW: no ghost batch norm, and a decay that is not added to a slope."""
    return load("language", ",".join([
        "bytes", "dtype=float64", "model.blocks=1", "model.width=24", "model.heads=2",
        "model.hidden=48", "data.num_classes=256",
        "data.options.length=8", "optimizer.clip_norm=0.5", "ghost_size=2", "recipe.curve=steps",
        "recipe.falls=(('80 examples',2),)", "recipe.warmup_epochs=0.0", *settings]))


CONFIGS = {"stack": stack, "adamw": adamw}


@cache
def on_one_device(name, updates):
    return train(CONFIGS[name](), 1, updates)


def assert_same_curve(states, measured, name, updates=20):
    references, expected = on_one_device(name, updates)
    for field, tree, other in zip(states[-1]._fields, states[-1], references[-1], strict=True):
        assert distance(tree, other) <= 1e-10, field
    np.testing.assert_allclose(
        *([one.loss for one in each] for each in (measured, expected)), rtol=1e-10)
    assert all(one.finite for one in measured)


# --- the curve ------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("split", [OPTIMIZER, PARAMETERS])
@pytest.mark.parametrize("devices", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_split_state_has_the_same_curve(name, devices, split, passes):
    """Parameters, statistics, optimizer state and average, through a change of the batch."""
    config = CONFIGS[name](*split, f"microbatches={passes}")
    assert_same_curve(*train(config, devices), name)


def test_a_split_transformer_has_the_same_curve():
    """A short form of the above."""
    assert_same_curve(*train(adamw(*PARAMETERS), 4, 3), "adamw", 3)


@pytest.mark.slow
def test_a_run_goes_on_with_another_split_on_other_devices():
    """Five updates each way, of which the first ten have 3 ghost batches and the others 9.

    tests/test_split_runs.py has a short form.
    """
    states = []
    for count, (devices, settings) in enumerate([
            (8, (*PARAMETERS, "sharding.shards=4", "microbatches=2")), (8, OPTIMIZER),
            (4, (*OPTIMIZER, "sharding.shards=2", "microbatches=2")), (3, PARAMETERS)], 1):
        more, measured = train(stack(*settings), devices, 5 * count, begin_with=states)
        states += more
    assert_same_curve(states, on_one_device("stack", 20)[1][:-5] + measured, "stack")


def test_each_device_draws_its_pieces_of_the_same_initial_state():
    """Also of an average, whose arrays are its own."""
    config = stack(*PARAMETERS, "dtype=float32", "optimizer.name=adam")
    mesh, net = make_mesh(jax.devices()[:4]), network.build(config)
    shapes = update.abstract_state(config, net, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, shapes)
    state = update.make_init(config, net, shardings)(np.uint32(config.seed))
    for leaf, like in zip(jax.tree.leaves(state), jax.tree.leaves(shapes), strict=True):
        assert leaf.sharding == like.sharding
    whole = update.init_state(config, net)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), jax.device_get(whole))
    assert state.params["head"]["kernel"] is not state.average["params"]["head"]["kernel"]


# --- what is exchanged ----------------------------------------------------------------------------
def cut_bytes(updater):
    """The bytes of all parameters that are cut."""
    split = sharding.split_of(updater.config, updater.net.params, updater.mesh)
    return sum(leaf.size * leaf.dtype.itemsize for leaf, axis in zip(
        jax.tree.leaves(updater.net.params), jax.tree.leaves(split.axes), strict=True)
        if axis != sharding.WHOLE)


def counted(updater):
    """{program: how often it gathers, scatters and reduces}, before any of it is compiled."""
    return {name: [program.as_text().count(f"stablehlo.{kind}") for kind in (
        "all_gather", "reduce_scatter", "all_reduce")]
        for name, program in lowered(updater).items()}


def test_an_update_scatters_and_gathers_the_parameters_once_and_a_pass_is_silent():
    updater = prepare(stack(*OPTIMIZER, "optimizer.clip_norm=0.0", "dtype=float32",
                            "noise.by_groups=true"), 8)
    size = cut_bytes(updater)
    assert size > 0.8 * sum(leaf.nbytes for leaf in jax.tree.leaves(updater.state.params))
    # Beside what is whole, a scalar is reduced: the squares of all pieces, for the noise scale.
    assert counted(updater) == {"accumulate": [0, 0, 0], "apply": [1, 1, 2], "update": [1, 1, 2],
                                "measure": [0, 1, 2]}
    found = collectives(lowered(updater)["update"].compile().as_text())
    assert found.keys() == {"reduce-scatter", "all-gather", "all-reduce"}
    assert found["reduce-scatter"] == [1, size // 8] and found["all-gather"] == [1, size]
    assert found["all-reduce"][1] < 0.1 * size  # statistics, measurements, small arrays
    for field in ("opt_state", "average"):
        for leaf in jax.tree.leaves(getattr(updater.state, field)):
            if leaf.size > 10 * WIDTH:
                assert leaf.addressable_data(0).size == leaf.size // 8


def test_a_pass_over_parameters_in_pieces_gathers_each_block_twice_and_the_rest_once():
    """As it is lowered: a CPU's compiler then gathers once and keeps what it has."""
    updater = prepare(stack(*PARAMETERS, "optimizer.clip_norm=0.0", "noise.by_groups=true"), 8)
    blocks = len(updater.net.params["blocks"])
    assert counted(updater) == {
        "accumulate": [1 + 2 * blocks, 1 + blocks, 1],  # the weight of the pass
        # What is whole, the squares, and the sum of all parameters, which tells if it is finite.
        "apply": [0, 0, 3], "measure": [0, 0, 2],
        # A pass of devices that share all is one group, which tells no noise.
        "update": [1 + 2 * blocks, 1 + blocks, 2]}
    sums = updater.functions.sums.gradient
    assert sums["head"]["kernel"].shape == (8, WIDTH // 8, 10)


# --- the rule -------------------------------------------------------------------------------------
def specs(shapes, settings, devices=8):
    """The specs of parameters of these shapes, where the optimizer's state is split."""
    config = stack(*OPTIMIZER, *settings)
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    mesh = make_mesh(jax.devices()[:devices], config.sharding.shards)
    state = update.State(params, {}, {"trace": params, "count": jax.ShapeDtypeStruct((), int)})
    lies = sharding.specs_of(sharding.state_sharding(config, state, mesh))
    assert set(jax.tree.leaves(lies.params)) == {P()} and lies.opt_state["count"] == P()
    return lies.opt_state["trace"]


def test_an_array_is_cut_along_its_longest_axis_that_the_devices_divide():
    shapes = {"kernel": (3, 16, 40), "table": (50_257, 768), "bias": (10,), "square": (64, 64),
              "scalar": (), "vector": (4096,)}
    found = specs(shapes, ("sharding.smallest=2",))
    assert found == {"kernel": P(None, None, "data"), "table": P(None, "data"), "bias": P(),
                     "square": P("data"), "scalar": P(), "vector": P()}
    assert specs(shapes, ("sharding.smallest=10000",)) == {
        **dict.fromkeys(shapes, P()), "table": P(None, "data")}
    # Two of eight devices hold a whole state between them, and the mesh has two axes.
    two = specs(shapes, ("sharding.smallest=2", "sharding.shards=2"))
    assert two["bias"] == P() and two["kernel"] == P(None, None, "shards")
    assert set(specs(shapes, ("sharding.smallest=2",), devices=1).values()) == {P()}
    named = specs(shapes, ("sharding.smallest=2",
                           "sharding.axes=(('ker*',1),('squ?re',None),('ker*',0),('vec*',0))"))
    assert named["kernel"] == P(None, "data") and named["square"] == P()
    assert named["vector"] == P("data") and found["vector"] == P()


@pytest.mark.parametrize(("settings", "said"), [
    (("sharding.axes=(('kernl',0),)",), "pattern 'kernl', which fits no parameter; there are"),
    (("sharding.axes=(('kernel',0),)",),
     r"along axis 0, but kernel has the shape \(3, 16\), which 8 devices .* it are 1"),
    (("sharding.axes=(('kernel',2),)",), "along axis 2"),
    (("sharding.axes=('kernel',)",), "'kernel'; it takes pairs"),
    (("sharding.shards=3",), "shards is 3, .* number of devices, 8; set it to 0, .* 1, 2, 4, 8"),
])
def test_what_cannot_be_cut_is_refused(settings, said):
    with pytest.raises(Mistake, match=said):
        specs({"kernel": (3, 16)}, settings)


def test_a_split_that_leaves_most_of_it_whole_says_so():
    params = {"kernel": jax.ShapeDtypeStruct((3, 16), jnp.float32),
              "table": jax.ShapeDtypeStruct((10, 9), jnp.float32)}
    mesh = make_mesh(jax.devices()[:8])
    (note,) = sharding.notes(stack(*OPTIMIZER), params, mesh)
    assert note.startswith("config.sharding cuts 35% of the parameters: the others have no axis")
    assert sharding.notes(stack(*OPTIMIZER), params, make_mesh(jax.devices()[:3])) == []
    assert sharding.notes(stack(), params, mesh) == []


def test_where_gradients_come_added_up_a_pass_measures_one_ghost_batch():
    """All of them are taken once, by the first device."""
    config = stack(*PARAMETERS, "noise.every_epochs=0.1", "noise.ghosts=3")
    ghosts_MxDxS = ghosts_by_slot(noise_layout(config, 4))
    assert ghosts_MxDxS[:, 0, 0].tolist() == [0, 1, 2] and np.all(ghosts_MxDxS[:, 1:] == -1)
    config = stack(*OPTIMIZER, "noise.every_epochs=0.1", "noise.ghosts=3")
    assert ghosts_by_slot(noise_layout(config, 4)).tolist() == [[[0], [1], [2], [-1]]]


def own(name, options):
    config = with_model("support.foreign_models.Regression", {}, f"optimizer.name={name}",
                        "exchange=linear", "sharding.optimizer=true")
    config.optimizer.options = ConfigDict(options)
    return config


@pytest.mark.parametrize(("name", "options", "operation"), [
    ("tests.support.own_optimizers.lamb",
     {"b1": "momentum", "b2": "beta2", "weight_decay": "weight_decay"}, "reduce_sum"),
    ("tests.support.own_optimizers.muon", {"beta": "momentum", "b2": "beta2"}, ""),
    ("optax.scale_by_lion", {"b1": "momentum", "b2": "beta2"}, None),
    ("optax.scale_by_yogi", {}, None),
])
def test_only_an_optimizer_that_looks_at_one_number_at_a_time_is_split(name, options, operation):
    config = own(name, options)
    params = network.build(config).params
    if operation is None:
        own_optimizer.check(config, params)
        return
    with pytest.raises(Mistake, match=f"{name}.* does not look at one number .*{operation}"):
        own_optimizer.check(config, params)
    config.sharding.optimizer = False
    own_optimizer.check(config, params)
