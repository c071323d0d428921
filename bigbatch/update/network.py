"""The network that a config names, as pure functions of its parameters and running statistics."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.errors
import jax
import jax.numpy as jnp
from flax import linen, nnx
from ml_collections import ConfigDict

from bigbatch import dotted
from bigbatch.mistake import Mistake
from bigbatch.models.blocks import Blocks
from bigbatch.models.layer_norms import LayerNorm, RMSNorm
from bigbatch.models.normalization import GhostBatchNorm
from bigbatch.tasks import contract
from bigbatch.update import dependence, independence, module_checks, noise, task_checks

Tree = Mapping[str, Any]
Gather = Callable[[dict[tuple, jax.Array]], dict[tuple, jax.Array]]

# Tags to fold into the key of the seed, so that no two uses draw the same random numbers. The order
# of the examples and the crops of photographs have their own (schedule/order.py, data/decode.py).
INITIALISATION, AUGMENTATION, DROPOUT = 1, 2, 3


class Network(NamedTuple):
    """A network as pure functions, without its variables. Trees are nested dicts of arrays."""

    init: Callable[[jax.Array], tuple[Tree, Tree]]  # seed, uint32 -> parameters, running statistics
    params: Tree  # shapes of the parameters
    batch_stats: Tree  # shapes of the running statistics
    # (parameters, running statistics, inputs_B, train, keys_B) -> what the module returns,
    # statistics (in training with one row per ghost batch). Where the parameters are in pieces also
    # gather: {path: piece} -> {path: whole array}; see `models.blocks`.
    apply: Callable[..., tuple[Any, Tree]]
    decays: Tree  # like the statistics: the share of each that remains after one ghost batch
    in_norm: Tree  # like the parameters: True for the parameters of normalisation layers
    reported: tuple[str, ...]  # what a run reports of the task's losses
    copied: Tree  # like the parameters: True for those that may come in copies; see `_copied`
    copied_for: int  # the neighbouring examples that share a copy; 0 if no parameter is copied


def build(config: ConfigDict, may_mix: bool = False) -> Network:
    """Builds the network of `config.network` with the arguments `config.model`.

    `config.network` is the dotted path of a function `(num_classes, dtype, rngs, **config.model)`
    that returns an nnx.Module. The module is called as `(inputs, train, keys)`, on what the task
    prepares (images, for one) and with one random key per example, and returns what the task's
    losses take (logits, for one). Its parameters are float32 (float64 if config.dtype is). A Linen
    module is wrapped in `nnx.bridge.ToNNX`. A GhostBatchNorm inside it is wrapped in
    `nnx.bridge.ToLinen`, and the Linen module is then called with mutable=["batch_stats"] in
    training.

    Args:
        config: of the run.
        may_mix: True takes a module that mixes the examples of a batch, for a comparison on one
            device in one pass. No run does that.

    Raises:
        Mistake: if the path does not exist, the arguments do not fit, the module cannot be called
            as above or returns something else, or it holds a layer or variable whose result would
            depend on how a batch is cut over devices and microbatches (Flax's own BatchNorm or
            Dropout, random streams, other variables). The message names the layer. Or if the task
            does not keep to `bigbatch.tasks`. Nothing is compiled before this error.
    """
    name, num_classes, dtype = config.network, config.data.num_classes, jnp.dtype(config.dtype)
    if dtype == jnp.float64 and not jax.config.jax_enable_x64:
        raise Mistake(
            "config.dtype is float64, but JAX's 64-bit mode is off: first call "
            "jax.config.update('jax_enable_x64', True)."
        )
    function = dotted.resolve(name, "config.network")
    arguments = config.model.to_dict()
    module_checks.check_arguments(function, arguments, name)

    @jax.jit  # so that it is traced only once, for the shapes below and for the values in `init`
    def construct(seed: jax.Array) -> tuple[nnx.GraphDef, nnx.State, nnx.State, nnx.State]:
        key = jax.random.key(seed, impl="threefry2x32")
        key = jax.random.fold_in(key, INITIALISATION)
        rngs = nnx.Rngs(key)
        rngs.default = _Stream(key, tag="default")  # for streams of any name
        module = function(num_classes, dtype, rngs, **arguments)
        module_checks.check_callable(module, name)
        module_checks.check_constants(module, name)
        # Streams that no training call draws from.
        for bridge in _bridges(module).values():
            bridge.to_nnx__rngs = None  # left from initialisation
        for _, part in nnx.iter_modules(module):
            if isinstance(part, nnx.Dropout) and part.rate == 0:
                part.rngs = nnx.data(None)
        return nnx.split(module, nnx.Param, nnx.BatchStat, ...)

    linen_layers: dict[tuple, str] = {}  # class name by path
    with linen.intercept_methods(module_checks.watch_linen(linen_layers, name)):
        seed = jax.ShapeDtypeStruct((), jnp.uint32)
        with module_checks.naming_the_layer(name):
            graph, params, batch_stats, rest = jax.eval_shape(construct, seed)
        abstract = nnx.merge(graph, params, batch_stats, rest)
        module_checks.check_modules(abstract, name)
        module_checks.check_state(params, batch_stats, rest, config)
        def apply(
            params_dict: Tree, stats_dict: Tree, inputs: Any, train: bool, keys: jax.Array,
            gather: Gather | None = None,
        ) -> tuple[Any, Tree]:
            if gather:
                params_dict = _gather_outside_blocks(abstract, params_dict, gather)
            module = nnx.merge(
                graph, _fill(params, params_dict), _fill(batch_stats, stats_dict), copy=True)
            if gather:
                _gather_in_blocks(module, gather)
            outputs = module(inputs, train, keys)
            return outputs, nnx.to_pure_dict(nnx.state(module, nnx.BatchStat))

        shapes = nnx.to_pure_dict(params), nnx.to_pure_dict(batch_stats)
        task, examples = contract.task_of(config), config.ghost_size * dependence.GHOSTS
        inputs, targets = task_checks.prepared(config, task, examples)
        copied = _copied(abstract, params, batch_stats, config.ghost_size)
        with module_checks.naming_the_layer(name, task_checks.described(task, inputs)):
            copied, found, results = _trace_copying(apply, copied, *shapes, inputs, name)
        reported = task_checks.reported(config, task, results[0], targets, examples, may_mix)
        if not may_mix:
            independence.refuse_mixing(
                name, found, results, "as layer or group norm does, or use GhostBatchNorm")
            task_checks.check_evaluation(config, task, name, apply, *shapes)

    def init(seed: jax.Array) -> tuple[Tree, Tree]:
        _, drawn, began, _ = construct(seed)
        return nnx.to_pure_dict(drawn), nnx.to_pure_dict(began)

    decays = jax.tree.map(
        lambda variable: variable.get_metadata()["decay"], batch_stats,
        is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
    )
    return Network(
        init, *shapes, apply, nnx.to_pure_dict(decays), _in_norm(abstract, params, linen_layers),
        reported, *copied,
    )


class _Stream(nnx.RngStream):
    """Flax's stream of random keys, without its `count[...] += 1`.

    That statement asks for the sharding of the old and the new count. In a trace this takes JAX
    long, and longer with every key drawn before.
    """

    def __call__(self) -> jax.Array:
        key = jax.random.fold_in(self.key[...], self.count[...])
        self.count.set_value(self.count[...] + 1)
        return key


def _fill(state: nnx.State, values: Tree) -> nnx.State:
    """A copy of `state`, with its structure and metadata, that holds `values`."""
    filled = jax.tree.map(lambda leaf: leaf, state)
    nnx.replace_by_pure_dict(filled, values)
    return filled


def _gather_outside_blocks(module: nnx.Module, params: Tree, gather: Gather) -> Tree:
    """The parameters of a module, with those whole that belong to no list of blocks."""
    lists = [path for path, part in nnx.iter_modules(module) if isinstance(part, Blocks)]
    flat = nnx.traversals.flatten_mapping(params)
    outside = {path: leaf for path, leaf in flat.items()
               if not any(path[: len(one)] == one for one in lists)}
    return nnx.traversals.unflatten_mapping({**flat, **gather(outside)})


def _gather_in_blocks(module: nnx.Module, gather: Gather) -> None:
    """Lets every list of blocks gather the parameters of a block when it is called."""
    def of_block(path: tuple) -> Callable[[nnx.State], nnx.State]:
        def whole(state: nnx.State) -> nnx.State:
            flat = nnx.traversals.flatten_mapping(nnx.to_pure_dict(state))
            found = gather({(*path, *inner): leaf for inner, leaf in flat.items()})
            return _fill(state, nnx.traversals.unflatten_mapping(
                {inner[len(path):]: leaf for inner, leaf in found.items()}))

        return whole

    for path, part in nnx.iter_modules(module):
        if isinstance(part, Blocks):
            part.gathers = tuple(of_block((*path, number)) for number in range(len(part)))


def _bridges(module: nnx.Module) -> dict[tuple, nnx.bridge.ToNNX]:
    """The Linen modules that are wrapped in Flax's bridge, by path."""
    return {
        path: part for path, part in nnx.iter_modules(module)
        if isinstance(part, nnx.bridge.ToNNX)
    }


def _in_norm(
    module: nnx.Module, params: nnx.State, linen_layers: Mapping[tuple, str]
) -> Tree:
    """Marks the parameters of layers whose class name ends in Norm, as it does for Flax's own."""
    layers = {path: type(part).__name__ for path, part in nnx.iter_modules(module)}
    for bridge in _bridges(module):
        layers |= {(*bridge, *path): kind for path, kind in linen_layers.items()}
    flat = {
        path: layers.get(path[:-1], "").endswith("Norm") for path, _ in nnx.to_flat_state(params)
    }
    return nnx.traversals.unflatten_mapping(flat)


def _copied(
    module: nnx.Module, params: nnx.State, batch_stats: nnx.State, ghost_size: int
) -> tuple[Tree, int]:
    """Which parameters may come in copies on a leading axis in training, and for how many examples.

    A GhostBatchNorm takes a copy of its scale and bias for each ghost batch, and the layers of
    `layer_norms` take one for each example. Where ghost batches are normalised, the gradients of
    the examples in one of them depend on each other, so that a ghost batch is the least that can
    have copies. Inside of a Linen module no layer is found.
    """
    kinds, examples = ((GhostBatchNorm,), ghost_size) if jax.tree.leaves(batch_stats) else (
        (LayerNorm, RMSNorm), 1)
    own = {path for path, part in nnx.iter_modules(module) if type(part) in kinds}
    flat = {path: path[:-1] in own for path, _ in nnx.to_flat_state(params)}
    return nnx.traversals.unflatten_mapping(flat), examples if any(flat.values()) else 0


def _trace_copying(
    apply: Callable, copied: tuple[Tree, int], params: Tree, batch_stats: Tree, inputs: Any,
    name: str,
) -> tuple[tuple[Tree, int], Tree, Tree]:
    """What `_trace` returns of the network as an update calls it, after what comes in copies."""
    marks, examples = copied

    def copying(params: Tree, stats: Tree, inputs: Any, train: bool, keys: jax.Array) -> Any:
        copies = noise.with_copies(params, marks, len(keys) // examples)
        return apply(copies, stats, inputs, train, keys)

    if examples:
        try:
            return copied, *_trace(copying, params, batch_stats, inputs, name)
        except Exception:
            # It may read a scale or bias outside of its layer, where copies do not fit. What else
            # is wrong is told by the trace without them.
            copied = jax.tree.map(lambda _: False, marks), 0
    return copied, *_trace(apply, params, batch_stats, inputs, name)


def _trace(
    apply: Callable, params: Tree, batch_stats: Tree, inputs: Any, name: str
) -> tuple[Tree, Tree]:
    """Checks a training call of the module by tracing it; nothing is computed.

    Returns:
        The dependences of the call's results, and their shapes.
    """
    def call(constants: tuple[Tree, Tree], inputs: Any, keys: jax.Array) -> tuple[Any, Tree]:
        return apply(*constants, inputs, True, keys)

    keys = task_checks.keys(len(jax.tree.leaves(inputs)[0]))
    try:
        shapes, found = independence.trace(call, (params, batch_stats), inputs, keys)
    except flax.errors.InvalidRngError as error:
        raise Mistake(
            f"{name} draws from a random stream of Linen's; draw from the keys the module is "
            "called with, one per example, so that the numbers do not depend on how a batch is cut "
            f"over devices and microbatches. Flax says: {error}"
        ) from None
    running = dict(jax.tree_util.tree_leaves_with_path(batch_stats))
    for path, row in jax.tree_util.tree_leaves_with_path(shapes[1]):
        if row.shape != (dependence.GHOSTS, *running[path].shape):
            raise Mistake(
                f"{name} does not update the statistic {jax.tree_util.keystr(path)} in training; "
                "call GhostBatchNorm with train=True there (through Flax's bridge also with "
                "mutable=['batch_stats'])."
            )
    return found, shapes
