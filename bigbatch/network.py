"""The network a config names, as pure functions of its parameters and running statistics."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen, nnx
from ml_collections import ConfigDict

from bigbatch import dotted
from bigbatch.models.normalization import GhostBatchNorm

Tree = Mapping[str, Any]


class Network(NamedTuple):
    """A model without its variables. Trees are nested dicts of arrays."""

    init: Callable[[int], tuple[Tree, Tree]]  # seed -> parameters, running statistics
    # (parameters, statistics, images_BxHxWxC, train, keys_B) -> logits_BxK, [(weight, logits)...],
    # statistics: in training one row a ghost batch.
    apply: Callable[..., tuple[jax.Array, list, Tree]]
    decays: Tree  # like the statistics: what remains of each after one ghost batch
    in_norm: Tree  # like the parameters: True for those of a normalisation layer


def build(config: ConfigDict) -> Network:
    """The network of `config.network` with the arguments `config.model`.

    The contract: a function `(num_classes, dtype, rngs, **config.model)` that returns an
    nnx.Module called as `(images, train, keys)`, with one random key an example, and giving logits
    or (logits, [(weight, auxiliary logits)...]).

    Raises:
        ValueError: if the path leads nowhere, the arguments do not fit, or the module holds
            something whose result would depend on how a batch is cut up (Flax's own BatchNorm or
            Dropout), naming the layer.
    """
    function = dotted.resolve(config.network, "config.network")
    arguments = config.model.to_dict()
    dtype = jnp.dtype(config.dtype)
    try:
        inspect.signature(function).bind(config.data.num_classes, dtype, None, **arguments)
    except TypeError as error:
        raise ValueError(
            f"{config.network} does not take config.model's keys {sorted(arguments)}: {error}."
        ) from None

    def construct(seed: int | jax.Array) -> nnx.Module:
        key = jax.random.key(seed, impl="threefry2x32")
        rngs = nnx.Rngs(params=jax.random.fold_in(key, INITIALISATION))
        return function(config.data.num_classes, dtype, rngs, **arguments)

    abstract = nnx.eval_shape(lambda: construct(0))
    _check_modules(abstract, config)
    graph, params, batch_stats, rest = nnx.split(abstract, nnx.Param, nnx.BatchStat, ...)
    _check_state(batch_stats, rest)
    decays = jax.tree.map(
        lambda variable: variable.get_metadata()["decay"], batch_stats,
        is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
    )
    # Random streams a bridged Linen module carries along and never draws from.
    unused = jax.tree.map(_blank, rest)

    def init(seed: int) -> tuple[Tree, Tree]:
        def pure(seed: jax.Array) -> tuple[Tree, Tree]:
            _, params, batch_stats, _ = nnx.split(construct(seed), nnx.Param, nnx.BatchStat, ...)
            return nnx.to_pure_dict(params), nnx.to_pure_dict(batch_stats)

        return jax.jit(pure)(jnp.uint32(seed))

    def apply(
        params_dict: Tree, stats_dict: Tree, images: jax.Array, train: bool, keys: jax.Array
    ) -> tuple[jax.Array, list, Tree]:
        module = nnx.merge(graph, _fill(params, params_dict), _fill(batch_stats, stats_dict),
                           unused, copy=True)
        outputs = module(images, train, keys)
        logits, auxiliary = outputs if isinstance(outputs, tuple) else (outputs, [])
        return logits, auxiliary, nnx.to_pure_dict(nnx.state(module, nnx.BatchStat))

    network = Network(init, apply, nnx.to_pure_dict(decays), _in_norm(abstract, params))
    _check_outputs(network, nnx.to_pure_dict(params), nnx.to_pure_dict(batch_stats), config)
    return network


# Fixed tags folded into the one seed, so that no two uses draw from the same stream. The order of
# examples has a tag of its own in data/order.py.
INITIALISATION, AUGMENTATION, DROPOUT = 1, 2, 3


def _fill(state: nnx.State, values: Tree) -> nnx.State:
    """`values` with the structure and metadata of `state`."""
    filled = jax.tree.map(lambda leaf: leaf, state)
    nnx.replace_by_pure_dict(filled, values)
    return filled


def _blank(leaf: Any) -> jax.Array:
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jnp.broadcast_to(jax.random.key(0), leaf.shape)
    return jnp.zeros(leaf.shape, leaf.dtype)


def _name(path: tuple) -> str:
    return ".".join(map(str, path)) or "the module itself"


_REFUSED = (
    "{network} holds {kind} at {path}, whose result depends on how a batch is cut over devices and "
    "microbatches; use {instead} instead."
)
_INSTEAD = {
    "BatchNorm": "bigbatch.models.normalization.GhostBatchNorm",
    "Dropout": "bigbatch.models.dropout.dropout",
}


def _check_modules(module: nnx.Module, config: ConfigDict) -> None:
    for path, part in nnx.iter_modules(module):
        for kind in (nnx.BatchNorm, nnx.Dropout):
            if isinstance(part, kind):
                raise ValueError(_REFUSED.format(
                    network=config.network, kind=f"flax.nnx.{kind.__name__}", path=_name(path),
                    instead=_INSTEAD[kind.__name__],
                ))
        if isinstance(part, GhostBatchNorm) and part.ghost_size != config.ghost_size:
            raise ValueError(
                f"{config.network} normalises ghost batches of {part.ghost_size} at {_name(path)}, "
                f"but config.ghost_size is {config.ghost_size}; give the model "
                "ghost_size=config.get_ref('ghost_size') in config.model."
            )


def _check_state(batch_stats: nnx.State, rest: nnx.State) -> None:
    def variables(state: nnx.State) -> list:
        return [
            (path, leaf) for path, leaf in nnx.to_flat_state(state)
            if isinstance(leaf, nnx.Variable)
        ]

    for path, variable in variables(rest):
        if not isinstance(variable, nnx.RngState):
            raise ValueError(
                f"the model keeps {type(variable).__name__} at {_name(path)}; only parameters "
                "(nnx.Param) and GhostBatchNorm's statistics are carried from update to update."
            )
    for path, variable in variables(batch_stats):
        if "decay" not in variable.get_metadata():
            raise ValueError(
                f"the model keeps a batch statistic at {_name(path)} that is not GhostBatchNorm's, "
                "so how to fold an update's ghost batches into it is unknown."
            )


def _check_outputs(network: Network, params: Tree, batch_stats: Tree, config: ConfigDict) -> None:
    """Traces the model once (nothing is computed): its output's shape, and what Linen holds."""
    data, ghost = config.data, config.ghost_size
    size = data.image_size

    def refuse_linen(call: Callable, arguments: tuple, keywords: dict, context: Any) -> Any:
        for kind in (linen.BatchNorm, linen.Dropout):
            if isinstance(context.module, kind):
                raise ValueError(_REFUSED.format(
                    network=config.network, kind=f"flax.linen.{kind.__name__}",
                    path=_name(context.module.path), instead=_INSTEAD[kind.__name__],
                ))
        return call(*arguments, **keywords)

    images = jax.ShapeDtypeStruct((ghost, size, size, len(data.mean)), jnp.float32)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), ghost))

    def train_call(*arrays: Any) -> tuple:
        return network.apply(*arrays[:3], True, arrays[3])

    with linen.intercept_methods(refuse_linen):
        logits, *_ = jax.eval_shape(train_call, params, batch_stats, images, keys)
    if logits.shape != (ghost, data.num_classes):
        raise ValueError(
            f"{config.network} gives logits of shape {logits.shape} for {ghost} images; they must "
            f"be {(ghost, data.num_classes)}: (images, config.data.num_classes)."
        )


def _in_norm(module: nnx.Module, params: nnx.State) -> Tree:
    """Marks the parameters of layers whose name ends in Norm (Linen: with a number behind)."""
    norms = {
        path for path, part in nnx.iter_modules(module) if type(part).__name__.endswith("Norm")
    }

    def belongs(path: tuple) -> bool:
        if any(path[:end] in norms for end in range(len(path))):
            return True
        return any("Norm" in part for part in path if isinstance(part, str))

    flat = {path: belongs(path) for path, _ in nnx.to_flat_state(params)}
    return nnx.traversals.unflatten_mapping(flat)
