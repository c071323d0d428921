"""One parameter update: ghost batches on devices, microbatches, one reduction, the optimizer.

An update's result does not depend on how many devices or passes compute it. Each device sums, over
its own examples, gradients, ghost batches' statistics (already weighted by their place in the
global batch) and metrics; one reduction adds them up; the optimizer then sees the mean gradient.
With one microbatch all of that is one program, `update`; with more it is `accumulate` once a
microbatch, without any communication, then `apply`.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from bigbatch.data import augment
from bigbatch.job.devices import AXIS, compiler_options, cut, replicated
from bigbatch.models.normalization import fold_weights
from bigbatch.update.network import AUGMENTATION, DROPOUT, Network
from bigbatch.update.optimizer import init_optimizer, make_optimizer

Tree = Any


class State(NamedTuple):
    """What training changes and a checkpoint keeps (with examples_seen beside it)."""

    params: Tree
    batch_stats: Tree
    opt_state: Tree


class Sums(NamedTuple):
    """What devices add up over an update's examples."""

    gradient: Tree  # of the summed loss, like the parameters
    statistics: Tree  # sum_i (1-d) d^(k-1-i) s_i over ghost batches i, like the batch statistics
    loss: jax.Array  # cross entropy of the main logits, without smoothing or auxiliary losses
    correct: jax.Array
    examples: jax.Array
    ghosts: jax.Array


class Metrics(NamedTuple):
    """Of one update, over its whole batch, before the parameters moved."""

    loss: jax.Array
    accuracy: jax.Array
    finite: jax.Array  # False when the loss or any parameter after the update is not


class Update(NamedTuple):
    """The jitted functions of an update; `compilation` lowers them for each phase's shapes."""

    update: Callable  # (state, resident, batch, rate, momentum) -> state, metrics
    # (state, sums, resident, batch, first) -> sums, a number a device to wait for (sums are
    # donated to the next pass, so they themselves cannot be waited for)
    accumulate: Callable
    apply: Callable  # (state, sums, rate, momentum) -> state, metrics


def make_init(config: ConfigDict, network: Network) -> Callable:
    """The jitted function from the seed (uint32) to the state before the first update."""
    # Run once, which is not worth the seconds that LLVM takes to optimise random generators well.
    on_cpu = jax.default_backend() == "cpu"
    options = {"xla_backend_optimization_level": 1} if on_cpu else None

    def init(seed: jax.Array) -> State:
        params, batch_stats = network.init(seed)
        return State(params, batch_stats, init_optimizer(config, network.in_norm, params))

    return jax.jit(init, compiler_options=options)


def init_state(config: ConfigDict, network: Network) -> State:
    """The state before the first update; follows from the seed alone."""
    return make_init(config, network)(np.uint32(config.seed))


def abstract_state(config: ConfigDict, network: Network, mesh: Mesh) -> State:
    """Shapes of the state, replicated over `mesh`; computes nothing."""
    opt_state = jax.eval_shape(partial(init_optimizer, config, network.in_norm), network.params)
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated(mesh)),
        State(network.params, network.batch_stats, opt_state),
    )


def make_update(
    config: ConfigDict, network: Network, mesh: Mesh, prepare: Callable | None = None
) -> Update:
    """The update's functions over `mesh`, jitted but not yet compiled for any shape.

    Their arguments: `state` replicated; `resident`, replicated too: the run's `seed` (an input, so
    that the seeds of a sweep share programs), and the training set's `images` and `labels` unless
    they are fed; `batch`, one microbatch: `examples` (rows as `slots.lay_out_examples` makes them),
    and `images` and `labels` where they are fed, all cut over devices; `sums`, one of each device.
    `prepare`, where it is given, makes a microbatch's images of (config, resident, batch) in the
    place of `prepare_microbatch`.
    """
    whole, parts = P(), P(AXIS)
    microbatch_sums = partial(_microbatch_sums, config, network, prepare or prepare_microbatch)

    def mapped(function: Callable, in_specs: tuple, out_specs: Any) -> Callable:
        # check_vma would make gradients of replicated parameters arrive summed over devices, one
        # reduction a parameter; here the one reduction is ours.
        return jax.shard_map(
            function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )

    def update(state: State, resident: Mapping, batch: Mapping, rate: jax.Array,
               momentum: jax.Array) -> tuple[State, Metrics]:
        sums = microbatch_sums(state, resident, batch)
        return _apply_sums(config, network, state, sums, rate, momentum)

    def accumulate(state: State, sums: Sums, resident: Mapping, batch: Mapping,
                   first: jax.Array) -> tuple[Sums, jax.Array]:
        new = microbatch_sums(state, resident, batch)
        # `first` overwrites what the last update left, whatever it is: nothing has to be zeroed.
        sums = jax.tree.map(lambda old, new: jnp.where(first, 0, old) + new[None], sums, new)
        return sums, sums.examples + 0

    def apply(state: State, sums: Sums, rate: jax.Array,
              momentum: jax.Array) -> tuple[State, Metrics]:
        own = jax.tree.map(lambda leaf: leaf[0], sums)
        return _apply_sums(config, network, state, own, rate, momentum)

    jitted = partial(jax.jit, compiler_options=compiler_options(mesh))
    return Update(
        update=jitted(
            mapped(update, (whole, whole, parts, whole, whole), whole),
            donate_argnums=0,
        ),
        accumulate=jitted(
            mapped(accumulate, (whole, parts, whole, parts, whole), (parts, parts)),
            donate_argnums=1,
        ),
        apply=jitted(
            mapped(apply, (whole, parts, whole, whole), whole),
            donate_argnums=0,
        ),
    )


def abstract_sums(state: State, mesh: Mesh) -> Sums:
    """Shapes of the accumulating sums: one of each device, on a leading axis."""
    leaf = jax.tree.leaves(state.params)[0]
    scalar = jax.ShapeDtypeStruct((), leaf.dtype)
    one = Sums(state.params, state.batch_stats, scalar, scalar, scalar, scalar)
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((mesh.size, *leaf.shape), leaf.dtype, sharding=cut(mesh)),
        one,
    )


def _microbatch_sums(
    config: ConfigDict, network: Network, prepare: Callable, state: State, resident: Mapping,
    batch: Mapping
) -> Sums:
    """One device's sums over one microbatch."""
    images, labels, dropout_keys = prepare(config, resident, batch)
    ghosts_after_G = batch["examples"][:: config.ghost_size, 3]
    real = (batch["examples"][:, 3] >= 0) & (labels >= 0)
    dtype = jnp.promote_types(config.dtype, jnp.float32)
    targets = optax.smooth_labels(
        jax.nn.one_hot(labels, config.data.num_classes, dtype=dtype), config.label_smoothing
    )

    def own(logits_BxK: jax.Array) -> jax.Array:
        # Before the loss too: where a padding slot's loss is not finite, 0 times its slope is nan.
        return jnp.where(real[:, None], logits_BxK.astype(dtype), 0.0)

    def summed(losses_B: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(real, losses_B, 0.0))

    def objective(params: Tree) -> tuple[jax.Array, tuple]:
        logits, auxiliary, rows = network.apply(
            params, state.batch_stats, images, True, dropout_keys
        )
        logits = own(logits)
        loss = summed(optax.softmax_cross_entropy(logits, targets))
        for weight, more in auxiliary:
            loss += weight * summed(optax.softmax_cross_entropy(own(more), targets))
        return loss, (logits, rows)

    gradient, (logits, rows) = jax.grad(objective, has_aux=True)(state.params)
    plain = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))

    fold = partial(_fold_ghosts, ghosts_after_G)
    return Sums(
        gradient=gradient,
        statistics=jax.tree.map(fold, rows, network.decays),
        loss=summed(plain),
        correct=jnp.sum(real & (jnp.argmax(logits, axis=1) == labels)).astype(dtype),
        examples=jnp.sum(real).astype(dtype),
        ghosts=jnp.sum(ghosts_after_G >= 0).astype(dtype),
    )


@partial(jax.jit, static_argnames="decay", inline=True)  # traced once for statistics of a shape
def _fold_ghosts(ghosts_after_G: jax.Array, rows_GxC: jax.Array, decay: float) -> jax.Array:
    """What a microbatch's ghost batches add to a running statistic."""
    weights_G = fold_weights(ghosts_after_G, decay, rows_GxC.dtype)
    rows_GxC = jnp.where((ghosts_after_G >= 0)[:, None], rows_GxC, 0.0)
    return jnp.tensordot(weights_G, rows_GxC, axes=1, precision="highest")


def prepare_microbatch(
    config: ConfigDict, resident: Mapping, batch: Mapping
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A microbatch's images, augmented and normalised, its labels and its dropout keys."""
    record, epoch, place = (batch["examples"][:, column] for column in range(3))
    seed = jax.random.key(resident["seed"], impl="threefry2x32")
    keys = partial(augment.example_keys, epoch_B=epoch, place_B=place)
    if "images" in batch:
        source, labels, record = batch["images"], batch["labels"], jnp.arange(len(record))
    else:
        source, labels = resident["images"], resident["labels"][record]
    options = config.data.augment
    images = augment.take_augmented(
        source, record, keys(jax.random.fold_in(seed, AUGMENTATION)),
        options.pad, options.crop, options.flip,
    )
    images = augment.normalise(images, config.data.mean, config.data.std, jnp.dtype(config.dtype))
    return images, labels, keys(jax.random.fold_in(seed, DROPOUT))


def _apply_sums(
    config: ConfigDict, network: Network, state: State, sums: Sums, rate: jax.Array,
    momentum: jax.Array
) -> tuple[State, Metrics]:
    """The one reduction, then the optimizer and the running statistics."""
    if jax.lax.axis_size(AXIS) > 1:
        # As one vector, since XLA on CPU does not combine the reductions of hundreds of arrays into
        # one.
        vector, unravel = ravel_pytree(sums)
        sums = unravel(jax.lax.psum(vector, AXIS))
    gradient = jax.tree.map(lambda leaf: leaf / sums.examples, sums.gradient)
    optimizer = make_optimizer(config, network.in_norm, rate, momentum)
    steps, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, steps)

    def fold(running: jax.Array, added: jax.Array, decay: float) -> jax.Array:
        return jnp.exp(sums.ghosts * math.log(decay)) * running + added

    batch_stats = jax.tree.map(fold, state.batch_stats, sums.statistics, network.decays)
    loss = sums.loss / sums.examples
    # Anything that is not finite makes a sum that is not. Parameters of a shape are added up first:
    # each sum over an array is an operation of its own, of which there would be hundreds.
    by_shape: dict[tuple[int, ...], jax.Array] = {}
    for leaf in jax.tree.leaves(params):
        by_shape[leaf.shape] = by_shape.get(leaf.shape, 0) + leaf
    total = sum(map(jnp.sum, by_shape.values()), loss)
    metrics = Metrics(loss, sums.correct / sums.examples, jnp.isfinite(total))
    return State(params, batch_stats, opt_state), metrics
