"""What every network for ImageNet is asked: its arithmetic, its types, one real update."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bigbatch.config import base_config
from bigbatch.data.resident import lay_out
from bigbatch.job.devices import place, replicated
from bigbatch.schedule import order
from bigbatch.schedule.layout import make_layout

GHOST = 2


def abstract(model, num_classes=1000, dtype="float32", **arguments):
    """The network with shapes in place of arrays."""
    return nnx.eval_shape(
        lambda: model(num_classes, jnp.dtype(dtype), nnx.Rngs(0), ghost_size=GHOST, **arguments)
    )


def count(module, kind=nnx.Param):
    """Numbers in the variables of a kind."""
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module, kind)))


def keys(examples, seed=0):
    return jax.random.split(jax.random.key(seed), examples)


def operations(jaxpr):
    """Its operations; where platforms have forms of their own, those of the CPU."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "cond":
            yield from operations(equation.params["branches"][-1])
        else:
            yield equation


def forward_macs(module, size):
    """Multiplications of convolutions and dense layers for one image, those with padding too."""
    graph, state = nnx.split(module)

    def forward(state, image, key):
        return nnx.merge(graph, state)(image, False, key)

    traced = jax.make_jaxpr(forward)(
        state, jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32), keys(1)
    )
    total = 0
    for equation in operations(traced):
        if equation.primitive.name in ("conv_general_dilated", "dot_general"):
            kernel = equation.invars[1].aval
            total += equation.outvars[0].aval.size * kernel.size // kernel.shape[-1]
    return total


def random_state(module, seed=0):
    """Values for every variable that keep activations near 1 and make every one of them matter."""
    random = np.random.default_rng(seed)
    graph, state = nnx.split(module)

    def one(path, variable):
        name, shape = path[-1], variable.shape
        if name == "kernel":
            value = random.normal(size=shape) * np.sqrt(2 / np.prod(shape[:-1]))
        elif name in ("scale", "var"):
            value = random.uniform(0.5, 2.0, shape)
        else:
            value = random.normal(size=shape) * 0.3
        return variable.replace(jnp.asarray(value, variable.dtype))

    return nnx.merge(graph, nnx.map_state(one, state))


def check_types(model, size, **arguments):
    """bfloat16 computes in it and keeps all else in float32; float64 stays float64 throughout."""
    images = np.random.default_rng(1).normal(size=(2 * GHOST, size, size, 3))

    def make(dtype, kept):
        module = random_state(abstract(model, 10, dtype, **arguments))
        graph, state = nnx.split(module)

        def forward(state, images, train):
            module = nnx.merge(graph, state, copy=True)
            outputs = module(images, train, keys(len(images)))
            return outputs, nnx.state(module)

        inputs = state, jnp.asarray(images, kept)
        training = partial(forward, train=True)
        convolutions = {
            str(equation.outvars[0].aval.dtype)
            for equation in operations(jax.make_jaxpr(training)(*inputs))
            if equation.primitive.name == "conv_general_dilated"
        }
        assert convolutions == {dtype}, f"dtype {dtype}: convolutions give {convolutions}"
        for leaf in jax.tree.leaves(jax.eval_shape(training, *inputs)):
            assert getattr(leaf, "dtype", kept) == kept, f"dtype {dtype}: found {leaf}"
        return lambda: jax.jit(partial(forward, train=False))(*inputs)[0]

    jax.config.update("jax_enable_x64", True)
    make("float64", "float64")
    jax.config.update("jax_enable_x64", False)
    short, full = make("bfloat16", "float32")(), make("float32", "float32")()
    error = np.sqrt(np.mean((short - full) ** 2)) / np.std(full, axis=0).mean()
    assert error < 0.2, f"bfloat16 is off by {error:.2f} of the logits' deviation over images"


def small_config(path, size, num_classes=10, **model):
    """A config of the network at `path` for images of `size`."""
    config = base_config()
    config.network, config.ghost_size = path, GHOST
    config.model = {"ghost_size": GHOST, **model}
    config.data.update({"num_classes": num_classes, "image_size": size, "mean": (127.5,) * 3,
                        "std": (127.5,) * 3, "train_examples": 8})
    return config


def count_in_norms(updater):
    """Numbers in the parameters marked as a normalisation's."""
    marked = jax.tree.map(lambda leaf, norm: leaf.size * norm, updater.state.params,
                          updater.net.in_norm)
    return sum(jax.tree.leaves(marked))


def gradient_of_one_update(updater):
    """The gradient in a first real update on random images.

    Momentum's accumulator after the first update is the gradient.
    """
    config, batch = updater.config, 4 * GHOST
    size, classes = config.data.image_size, config.data.num_classes
    random = np.random.default_rng(2)
    resident = place({
        "images": lay_out(random.integers(0, 256, (batch, size, size, 3), dtype=np.uint8)),
        "labels": lay_out(random.integers(0, classes, batch, dtype=np.int32)),
        "seed": np.uint32(config.seed),
    }, replicated(updater.mesh))
    batches = updater.batches(order.records(0, 0, batch, batch),
                              make_layout(batch, GHOST, updater.mesh.size, batch, 0))
    before = jax.tree.map(np.asarray, updater.state)  # a copy: the update takes what it is given
    after, measured = updater.take(
        place(before, replicated(updater.mesh)), resident, batches, 0.1, 0.9
    )
    assert bool(measured.finite), f"the update left a loss of {measured.loss}"
    gradient = next(part.trace for part in after.opt_state if hasattr(part, "trace"))
    gradient = jax.tree.map(np.asarray, gradient)
    for old, new, step in zip(*map(jax.tree.leaves, (before.params, after.params, gradient)),
                              strict=True):
        np.testing.assert_allclose(new, old - 0.1 * step, rtol=1e-5, atol=1e-6)
    return gradient
