"""One parameter update: ghost batches on devices, microbatches, one all-reduce, the optimizer.

The result does not depend on how many devices or passes compute it. Each device adds up, over its
own examples, gradients, ghost batch statistics (weighted by their position in the global batch) and
metrics. One all-reduce adds up the sums of the devices, and the optimizer gets the mean gradient.
With one microbatch this is one program, `update`. With several it is `accumulate`, called once per
microbatch and without communication, then `apply`.

Where `config.sharding` splits the state, the reduction leaves each device with its own piece of the
gradient, the optimizer makes its step on it, and devices gather the new parameters where these are
to be whole. See `sharding` and `pieces`.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from bigbatch.config import epochs_of
from bigbatch.data import augment
from bigbatch.data.resident import fields_of
from bigbatch.job.devices import compiler_options, cut
from bigbatch.models.normalization import fold_weights
from bigbatch.schedule.rates import Rates
from bigbatch.tasks import contract, measures
from bigbatch.update import noise, pieces, sharding
from bigbatch.update.network import AUGMENTATION, DROPOUT, Network
from bigbatch.update.optimizer import init_optimizer, make_optimizer
from bigbatch.update.totals import totals

Tree = Any


class State(NamedTuple):
    """What updates change. A checkpoint holds the state and the position (examples seen)."""

    params: Tree
    batch_stats: Tree
    opt_state: Tree
    # The running average of both, as {"params": ..., "batch_stats": ...}; None where `config.ema`
    # is 0, and then it is not in checkpoints either.
    average: Tree = None


class Sums(NamedTuple):
    """What a device adds up over its examples of an update."""

    gradient: Tree  # of the summed objective; like the parameters
    statistics: Tree  # sum_i (1-d) d^(k-1-i) s_i over ghost batches i; like the batch statistics
    reported: measures.Reported  # what the task reports, by name
    weight: jax.Array  # of the objective
    ghosts: jax.Array  # number of ghost batches
    examples: jax.Array  # those that count
    groups: noise.Groups | None  # each device and each pass is one; None: not measured
    copies: noise.Groups | None  # each copy of the norms is one; None if there are no copies


class Metrics(NamedTuple):
    """Measurements of one update over its whole batch, with the parameters before the update."""

    means: dict[str, jax.Array]  # of what the task reports, by name; the "loss" is there
    weight: jax.Array  # of the objective over the whole batch; 0 if no example counted
    finite: jax.Array  # False if the loss, or a parameter after the update, is not finite
    noise: noise.Measured

    @property
    def loss(self) -> jax.Array:
        """The mean loss."""
        return self.means["loss"]


class Update(NamedTuple):
    """The jitted functions of an update; programs/lowering.py lowers them for given shapes."""

    update: Callable  # (state, resident, batch, rates) -> state, metrics
    # (state, sums, resident, batch, first) -> sums, one number per device. The caller waits for the
    # numbers, since the sums are donated to the next pass and cannot be waited for.
    accumulate: Callable
    apply: Callable  # (state, sums, rates) -> state, metrics
    # sums -> noise.Measured. Of sums that no update is made of; its groups are those of any update.
    measure: Callable
    sums: Sums  # shapes of what `accumulate` takes; see `abstract_sums`


def make_init(config: ConfigDict, network: Network, shardings: Any = None) -> Callable:
    """Makes the jitted function from the seed (uint32) to the state before the first update.

    Args:
        config: of the run.
        network: its network.
        shardings: of the state. Each device then draws only what it holds; the numbers are the
            same. None: on one device.
    """
    # Called once: not worth the seconds that LLVM takes to optimise the random generators well.
    on_cpu = jax.default_backend() == "cpu"
    options = {"xla_backend_optimization_level": 1} if on_cpu else None

    def init(seed: jax.Array) -> State:
        params, batch_stats = network.init(seed)
        opt_state = init_optimizer(config, network.in_norm, params)
        return State(params, batch_stats, opt_state, _averaged(config, params, batch_stats))

    return jax.jit(init, compiler_options=options, out_shardings=shardings)


def init_state(config: ConfigDict, network: Network) -> State:
    """The state before the first update, which follows from the config and its seed alone."""
    return make_init(config, network)(np.uint32(config.seed))


def abstract_state(
    config: ConfigDict, network: Network, mesh: Mesh, optimizer: bool = True
) -> State:
    """The shapes of the state, with how each array lies on `mesh`; computes nothing.

    Args:
        config: of the run.
        network: its network.
        mesh: the devices.
        optimizer: False leaves the optimizer's state out.
    """
    shapes = _shapes(config, network, optimizer)
    return jax.tree.map(
        lambda leaf, lies: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=lies),
        shapes, sharding.state_sharding(config, shapes, mesh))


def _shapes(config: ConfigDict, network: Network, optimizer: bool = True) -> State:
    init = partial(init_optimizer, config, network.in_norm)
    opt_state = jax.eval_shape(init, network.params) if optimizer else None
    return State(network.params, network.batch_stats, opt_state,
                 _averaged(config, network.params, network.batch_stats))


def _averaged(config: ConfigDict, params: Tree, batch_stats: Tree) -> Tree:
    """What is averaged over the updates, in the tree of `State.average`; None if nothing is.

    The average begins with the weights that the run begins with, as elsewhere. A correction for
    them, as Adam has it, would need the product of all `rates.average` so far as one more number of
    the state, and would differ only while that product is not small.
    """
    return {"params": params, "batch_stats": batch_stats} if config.ema else None


def make_update(
    config: ConfigDict, network: Network, mesh: Mesh, prepare: Callable | None = None
) -> Update:
    """Makes the functions of an update, jitted but not yet compiled for any shape.

    Their arguments are
    - `state`, as `abstract_state` says;
    - `resident`, replicated: the run's `seed` (an input, so that runs with other seeds share
      programs) and, unless the data set is streamed, the training set's fields as `Rows`;
    - `batch`, one microbatch, cut over the devices: `examples` (rows of `lay_out_examples`) and, if
      the data set is streamed, its fields and `usable`;
    - `sums`, those of each device on a leading axis, cut over the devices;
    - `first`, whether this is the update's first pass;
    - `rates`, scalar arrays, replicated: see `make_optimizer`.

    Args:
        config: of the run.
        network: the network to train.
        mesh: the devices.
        prepare: replaces the `prepare` of the config's task, if given.
    """
    whole, parts = P(), P(mesh.axis_names)
    split = sharding.split_of(config, network.params, mesh)
    network = _with_whole_copies(network, split)
    lies = sharding.specs_of(sharding.state_sharding(config, _shapes(config, network), mesh))
    task = contract.task_of(config)
    task = task._replace(prepare=prepare or task.prepare)
    microbatch_sums = partial(_microbatch_sums, config, network, task, split)
    apply_sums = partial(_apply_sums, config, network, split)

    def mapped(function: Callable, in_specs: tuple, out_specs: Any) -> Callable:
        # With check_vma, JAX itself would sum the gradients of replicated parameters over devices,
        # one all-reduce per parameter. Here `_apply_sums` does one all-reduce for everything.
        return jax.shard_map(
            function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )

    def update(state: State, resident: Mapping, batch: Mapping,
               rates: Rates) -> tuple[State, Metrics]:
        return apply_sums(state, microbatch_sums(split.groups > 1, state, resident, batch), rates)

    def accumulate(state: State, sums: Sums, resident: Mapping, batch: Mapping,
                   first: jax.Array) -> tuple[Sums, jax.Array]:
        new = microbatch_sums(True, state, resident, batch)
        # `first` discards the sums of the update before, finite or not: nothing has to be zeroed.
        sums = jax.tree.map(lambda old, new: jnp.where(first, 0, old) + new[None], sums, new)
        return sums, sums.ghosts + 0

    def own(sums: Sums) -> Sums:
        return jax.tree.map(lambda leaf: leaf[0], sums)

    def apply(state: State, sums: Sums, rates: Rates) -> tuple[State, Metrics]:
        return apply_sums(state, own(sums), rates)

    def measure(sums: Sums) -> noise.Measured:
        return _noise(network, split, pieces.reduce(split, own(sums)))

    jitted = partial(jax.jit, compiler_options=compiler_options(mesh, config.deterministic))
    return Update(
        update=jitted(
            mapped(update, (lies, whole, parts, whole), (lies, whole)),
            donate_argnums=0,
        ),
        accumulate=jitted(
            mapped(accumulate, (lies, parts, whole, parts, whole), (parts, parts)),
            donate_argnums=1,
        ),
        apply=jitted(
            mapped(apply, (lies, parts, whole), (lies, whole)),
            donate_argnums=0,
        ),
        measure=jitted(mapped(measure, (parts,), whole)),
        sums=abstract_sums(config, network, mesh),
    )


def abstract_sums(config: ConfigDict, network: Network, mesh: Mesh) -> Sums:
    """The shapes of the sums that passes accumulate: those of each device on a leading axis.

    Where parameters lie in pieces, a device's gradient is that of its pieces.
    """
    leaf = jax.tree.leaves(network.params)[0]
    scalar = jax.ShapeDtypeStruct((), leaf.dtype)
    reported = dict.fromkeys(network.reported, (scalar, scalar))
    split = sharding.split_of(config, network.params, mesh)
    network = _with_whole_copies(network, split)
    groups = noise.Groups(scalar, scalar, scalar)
    one = Sums(
        sharding.pieces_at_rest(split, network.params), network.batch_stats, reported, scalar,
        scalar, scalar, groups if _measures_groups(config, network) else None,
        groups if network.copied_for else None)
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((mesh.size, *leaf.shape), leaf.dtype, sharding=cut(mesh)),
        one,
    )


def _microbatch_sums(
    config: ConfigDict, network: Network, task: contract.Task, split: sharding.Split,
    grouped: bool, state: State, resident: Mapping, batch: Mapping
) -> Sums:
    """The sums of one device over one microbatch.

    `grouped`: whether it is one of several groups of examples, by devices or passes.
    """
    record, epoch, position, ghosts_after = (batch["examples"][:, column] for column in range(4))
    ghosts_after_G = ghosts_after[:: config.ghost_size]
    counts = ghosts_after >= 0
    if "usable" in batch:
        counts &= batch["usable"]
    seed = jax.random.key(resident["seed"], impl="threefry2x32")
    keys = partial(augment.example_keys, epoch_B=epoch, position_B=position)
    inputs, targets = contract.prepare(
        config, task, fields_of(resident, batch, record),
        keys(jax.random.fold_in(seed, AUGMENTATION)), True)
    dropout_keys = keys(jax.random.fold_in(seed, DROPOUT))
    gather = pieces.gatherer(split)

    def objective(params: Tree) -> tuple[jax.Array, tuple]:
        outputs, rows = network.apply(
            params, state.batch_stats, inputs, True, dropout_keys, gather)
        added = measures.add_up(config, task, outputs, targets, counts)
        return added.objective, (added, rows)

    params, copies = state.params, None
    if network.copied_for:
        params = noise.with_copies(params, network.copied, len(counts) // network.copied_for)
    gradient, (added, rows) = jax.grad(objective, has_aux=True)(params)
    if network.copied_for:
        gradient, copies = noise.without_copies(
            gradient, network.copied, added.weights_B, network.copied_for)
    fold = partial(_fold_ghosts, ghosts_after_G)
    dtype = jnp.promote_types(config.dtype, jnp.float32)
    return Sums(
        gradient=gradient,
        statistics=jax.tree.map(fold, rows, network.decays),
        reported=added.reported,
        weight=added.weight,
        ghosts=jnp.sum(ghosts_after_G >= 0).astype(dtype),
        examples=jnp.sum(counts).astype(dtype),
        groups=(pieces.one_group(split, gradient, added.weight)
                if grouped and _measures_groups(config, network) else None),
        copies=copies,
    )


@partial(jax.jit, static_argnames="decay", inline=True)  # traced once per shape of statistics
def _fold_ghosts(ghosts_after_G: jax.Array, rows_GxC: jax.Array, decay: float) -> jax.Array:
    """The weighted sum of a microbatch's ghost batch statistics; see `fold_weights`."""
    weights_G = fold_weights(ghosts_after_G, decay, rows_GxC.dtype)
    rows_GxC = jnp.where((ghosts_after_G >= 0)[:, None], rows_GxC, 0.0)
    return jnp.tensordot(weights_G, rows_GxC, axes=1, precision="highest")


def _apply_sums(
    config: ConfigDict, network: Network, split: sharding.Split, state: State, sums: Sums,
    rates: Rates,
) -> tuple[State, Metrics]:
    """Does the reduction, then applies the optimizer and updates the running statistics."""
    sums = pieces.reduce(split, sums)
    gradient = jax.tree.map(lambda leaf: leaf / sums.weight, sums.gradient)
    norm = partial(pieces.norm, split) if split.cuts else optax.tree.norm
    optimizer = make_optimizer(config, network.in_norm, rates, norm)
    before = state.params if split.parameters else pieces.own(split, state.params)
    steps, opt_state = optimizer.update(gradient, state.opt_state, before)
    params = optax.apply_updates(before, steps)

    def fold(running: jax.Array, added: jax.Array, decay: float) -> jax.Array:
        return jnp.exp(sums.ghosts * math.log(decay)) * running + added

    batch_stats = jax.tree.map(fold, state.batch_stats, sums.statistics, network.decays)
    average = jax.tree.map(
        lambda old, new: old + (1 - rates.average) * (new - old),
        state.average, _averaged(config, params, batch_stats))
    if not split.parameters:
        params = pieces.gather(split, params)
    means = {name: value / weight for name, (value, weight) in sums.reported.items()}
    total = means["loss"]  # and with all parameters not finite if any of them is not
    if split.parameters and split.cuts:
        total += pieces.add_over_pieces(split, params, lambda arrays: sum(totals(arrays)))
    else:
        total = sum(totals(jax.tree.leaves(params)), total)
    metrics = Metrics(
        means, sums.weight, jnp.isfinite(total), _noise(network, split, sums))
    return State(params, batch_stats, opt_state, average), metrics


def _noise(network: Network, split: sharding.Split, sums: Sums) -> noise.Measured:
    """The noise scale of the gradient, by the reduced sums; see `noise`."""
    of = partial(noise.estimate, weight=sums.weight, examples=sums.examples)
    square = partial(pieces.add_over_pieces, split, sums.gradient, noise.squared_norm)
    grouped = sums.groups is not None
    return noise.Measured(
        None if sums.copies is None else of(
            noise.squared_norm(noise.only(sums.gradient, network.copied)), groups=sums.copies),
        of(square(), groups=sums.groups) if grouped else None,
        sums.groups.count if grouped else None,
    )


def _measures_groups(config: ConfigDict, network: Network) -> bool:
    """Whether updates measure the noise by devices and passes: see config.noise.by_groups."""
    if config.noise.by_groups is not None:
        return config.noise.by_groups
    return not network.copied_for or bool(epochs_of(config, "noise.every_epochs"))


def _with_whole_copies(network: Network, split: sharding.Split) -> Network:
    """The network, of whose parameters only those that are whole may come in copies."""
    copied = jax.tree.map(lambda copy, axis: copy and axis == sharding.WHOLE,
                          network.copied, split.axes)
    any_copied = any(jax.tree.leaves(copied))
    return network._replace(copied=copied, copied_for=network.copied_for if any_copied else 0)
