"""The network that a config names, as pure functions of its parameters and running statistics."""

import contextlib
import inspect
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import FrameType
from typing import Any, NamedTuple

import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from ml_collections import ConfigDict

from bigbatch import dotted
from bigbatch.mistake import Mistake
from bigbatch.tasks import contract
from bigbatch.update import independence, task_checks
from bigbatch.update.user_lines import FLAX, JAX, is_users

Tree = Mapping[str, Any]

# Tags to fold into the key of the seed, so that no two uses draw the same random numbers. The order
# of the examples and the crops of photographs have their own (schedule/order.py, data/decode.py).
INITIALISATION, AUGMENTATION, DROPOUT = 1, 2, 3


class Network(NamedTuple):
    """A network as pure functions, without its variables. Trees are nested dicts of arrays."""

    init: Callable[[jax.Array], tuple[Tree, Tree]]  # seed, uint32 -> parameters, running statistics
    params: Tree  # shapes of the parameters
    batch_stats: Tree  # shapes of the running statistics
    # (parameters, running statistics, inputs_B, train, keys_B) -> what the module returns,
    # statistics (in training with one row per ghost batch)
    apply: Callable[..., tuple[Any, Tree]]
    decays: Tree  # like the statistics: the share of each that remains after one ghost batch
    in_norm: Tree  # like the parameters: True for the parameters of normalisation layers
    measured: tuple[str, ...]  # what the task's losses measure of it


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
    _check_arguments(function, arguments, name)

    @jax.jit  # so that it is traced only once, for the shapes below and for the values in `init`
    def construct(seed: jax.Array) -> tuple[nnx.GraphDef, nnx.State, nnx.State, nnx.State]:
        key = jax.random.key(seed, impl="threefry2x32")
        key = jax.random.fold_in(key, INITIALISATION)
        rngs = nnx.Rngs(key)
        rngs.default = _Stream(key, tag="default")  # for streams of any name
        module = function(num_classes, dtype, rngs, **arguments)
        _check_callable(module, name)
        _check_constants(module, name)
        # Streams that no training call draws from.
        for bridge in _bridges(module).values():
            bridge.to_nnx__rngs = None  # left from initialisation
        for _, part in nnx.iter_modules(module):
            if isinstance(part, nnx.Dropout) and part.rate == 0:
                part.rngs = nnx.data(None)
        return nnx.split(module, nnx.Param, nnx.BatchStat, ...)

    linen_layers: dict[tuple, str] = {}  # class name by path
    with linen.intercept_methods(_watch_linen(linen_layers, name)):
        seed = jax.ShapeDtypeStruct((), jnp.uint32)
        with _naming_the_layer(name):
            graph, params, batch_stats, rest = jax.eval_shape(construct, seed)
        abstract = nnx.merge(graph, params, batch_stats, rest)
        _check_modules(abstract, name)
        _check_state(params, batch_stats, rest, config)

        def apply(
            params_dict: Tree, stats_dict: Tree, inputs: Any, train: bool, keys: jax.Array
        ) -> tuple[Any, Tree]:
            module = nnx.merge(
                graph, _fill(params, params_dict), _fill(batch_stats, stats_dict), copy=True
            )
            outputs = module(inputs, train, keys)
            return outputs, nnx.to_pure_dict(nnx.state(module, nnx.BatchStat))

        shapes = nnx.to_pure_dict(params), nnx.to_pure_dict(batch_stats)
        task, examples = contract.task_of(config), config.ghost_size * independence.GHOSTS
        inputs, targets = task_checks.prepared(config, task, examples)
        with _naming_the_layer(name, task_checks.described(task, inputs)):
            found, results = _trace(apply, *shapes, inputs, name)
        measured = task_checks.measured(config, task, results[0], targets, examples, may_mix)
        if not may_mix:
            _check_apart(found, results, name)

    def init(seed: jax.Array) -> tuple[Tree, Tree]:
        _, drawn, began, _ = construct(seed)
        return nnx.to_pure_dict(drawn), nnx.to_pure_dict(began)

    decays = jax.tree.map(
        lambda variable: variable.get_metadata()["decay"], batch_stats,
        is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
    )
    return Network(
        init, *shapes, apply, nnx.to_pure_dict(decays), _in_norm(abstract, params, linen_layers),
        measured,
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


def _where(path: tuple) -> str:
    return ".".join(map(str, path)) or "the module itself"


def _check_arguments(function: Callable, arguments: Mapping[str, Any], name: str) -> None:
    # For a Module's class, `signature` returns that of the metaclass, which accepts anything.
    own = (None,) if inspect.isclass(function) else ()
    signature = inspect.signature(function.__init__ if own else function)
    try:
        signature.bind(*own, None, None, None, **arguments)
    except TypeError as error:
        allowed = [
            parameter.name for parameter in list(signature.parameters.values())[len(own) + 3 :]
            if parameter.kind != parameter.VAR_KEYWORD
        ]
        raise Mistake(
            f"{name} cannot be called as (num_classes, dtype, rngs, **config.model): {error}; its "
            f"own keys in config.model are {', '.join(sorted(allowed))}"
        ) from None


def _check_callable(module: Any, name: str) -> None:
    if not isinstance(module, nnx.Module):
        raise Mistake(
            f"{name} returns a {type(module).__name__}; it must return a flax.nnx.Module (a Linen "
            "module comes in as flax.nnx.bridge.ToNNX(module, rngs=rngs).lazy_init(images, ...))."
        )
    try:
        inspect.signature(module).bind(None, None, None)
    except TypeError as error:
        raise Mistake(
            f"{name} returns a {type(module).__name__} that cannot be called as (images, train, "
            f"keys): {error}."
        ) from None


_CONSTANTS = (
    "Create constants where they are used: inside __call__, or as NumPy arrays outside of the "
    "class."
)


def _check_constants(module: nnx.Module, name: str) -> None:
    """Refuses arrays that `__init__` leaves in the module beside its variables.

    `__init__` is traced. So what jax.numpy makes in it is a value of that trace and means nothing
    in a call, and Flax keeps it, as it keeps an `nnx.static` array, among the settings that it
    compares and hashes.
    """
    for path, part in nnx.iter_modules(module):
        for attribute, value in vars(part).items():
            found = _find_array(value)
            if found is not None:
                raise Mistake(
                    f"{name} keeps an array at {_where((*path, attribute))}{found}, which is "
                    "no parameter: arrays that __init__ makes mean nothing in a call. "
                    f"{_CONSTANTS}"
                )


def _find_array(
    value: Any, where: str = "", constant: bool = False, depth: int = 0
) -> str | None:
    """The place in `value` of an array that is in no variable; None if there is none.

    Args:
        value: of an attribute.
        where: a text for the place of `value` in the attribute.
        constant: whether arrays are constants there, unless a trace made them.
        depth: how far `value` lies within the attribute.
    """
    if isinstance(value, jax.core.Tracer) or (
        isinstance(value, jax.Array | np.ndarray) and depth and not constant
    ):
        return where
    if depth > 8 or isinstance(value, nnx.Variable | nnx.Module):
        return None
    inside: list[tuple[str, Any]] = []
    if isinstance(value, Mapping):
        inside = [(f"[{key!r}]", one) for key, one in value.items()]
    elif isinstance(value, list | tuple):
        inside = [(f"[{at}]", one) for at, one in enumerate(value)]
    elif isinstance(value, partial):
        held = [value.func, *value.args, *value.keywords.values()]
        inside, constant = [(" (in a partial)", one) for one in held], True
    elif inspect.isfunction(value):
        held = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
        inside = [(f" (in a function, as {key})", _content(cell)) for key, cell in held]
        constant = True
    elif isinstance(value, linen.Module):
        inside = [(f".{key}", getattr(value, key, None)) for key in value.__dataclass_fields__
                  if key not in ("parent", "name")]
    found = (_find_array(one, where + place, constant, depth + 1) for place, one in inside)
    return next((place for place in found if place is not None), None)


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # nothing was assigned yet
        return None


_INSTEAD = {
    "BatchNorm": "bigbatch.models.normalization.GhostBatchNorm",
    "Dropout": "bigbatch.models.dropout.dropout",
}


_ATTENTIONS = (nnx.MultiHeadAttention, linen.MultiHeadDotProductAttention)


def _refuse_layer(layer: nnx.Module | linen.Module, path: tuple, name: str) -> None:
    """Raises Mistake for Flax's own BatchNorm and Dropout, and for attention that drops out."""
    if isinstance(layer, _ATTENTIONS) and layer.dropout_rate:
        raise Mistake(
            f"{name} holds {type(layer).__name__} at {_where(path)} with dropout_rate="
            f"{layer.dropout_rate}, which draws one mask for a whole microbatch; give it "
            f"dropout_rate=0.0 and call {_INSTEAD['Dropout']}(x, rate, keys, train, tag) on its "
            "result, which takes the keys the module is called with. For dropout of the attention "
            "weights call flax.nnx.dot_product_attention(..., dropout_rng=key) of one example "
            "under jax.vmap over the examples and their keys."
        )
    for library, module in (("nnx", nnx), ("linen", linen)):
        for kind, instead in _INSTEAD.items():
            if isinstance(layer, getattr(module, kind)) and getattr(layer, "rate", None) != 0:
                raise Mistake(
                    f"{name} holds flax.{library}.{kind} at {_where(path)}, whose result depends "
                    f"on how a batch is cut over devices and microbatches; use {instead} instead."
                )


def _watch_linen(layers: dict[tuple, str], name: str) -> Callable:
    """Makes the interceptor that notes in `layers` each Linen layer called, if it is allowed."""
    def watch(call: Callable, arguments: tuple, keywords: dict, context: Any) -> Any:
        layer = context.module
        _refuse_layer(layer, layer.path, name)
        # A ToLinen wraps an NNX layer inside a Linen module.
        layers[layer.path] = getattr(layer, "nnx_class", type(layer)).__name__
        return call(*arguments, **keywords)

    return watch


def _check_modules(module: nnx.Module, name: str) -> None:
    for path, part in nnx.iter_modules(module):
        _refuse_layer(part, path, name)


def _check_state(
    params: nnx.State, batch_stats: nnx.State, rest: nnx.State, config: ConfigDict
) -> None:
    name = config.network
    for path, leaf in nnx.to_flat_state(rest):
        if isinstance(leaf, nnx.RngState):
            raise Mistake(
                f"{name} keeps a random stream at {_where(path)}; draw from the keys the module "
                "is called with, one per example, so that the numbers do not depend on how a batch "
                "is cut over devices and microbatches."
            )
        kind = type(leaf).__name__ if isinstance(leaf, nnx.Variable) else "a plain array"
        raise Mistake(
            f"{name} keeps {kind} at {_where(path)}; only parameters (nnx.Param) and "
            f"GhostBatchNorm's statistics are kept from update to update. {_CONSTANTS}"
        )
    for path, variable in nnx.to_flat_state(batch_stats):
        metadata = variable.get_metadata()
        if "ghost_size" not in metadata:
            raise Mistake(
                f"{name} keeps a batch statistic at {_where(path)} that is not GhostBatchNorm's, "
                "so it is unknown how to fold ghost batches into it: use GhostBatchNorm."
            )
        if metadata["ghost_size"] != config.ghost_size:
            raise Mistake(
                f"{name} normalises ghost batches of {metadata['ghost_size']} at "
                f"{_where(path[:-1])}, but config.ghost_size is {config.ghost_size}; give the "
                "model ghost_size=config.get_ref('ghost_size') in config.model."
            )
    wide = jnp.promote_types(config.dtype, jnp.float32)
    for path, variable in [*nnx.to_flat_state(params), *nnx.to_flat_state(batch_stats)]:
        if variable.dtype != wide:
            raise Mistake(
                f"{name} keeps {variable.dtype} at {_where(path)}; where config.dtype is "
                f"{config.dtype}, parameters and statistics are {wide}: give layers "
                "param_dtype=jax.numpy.promote_types(dtype, jax.numpy.float32)."
            )


@contextlib.contextmanager
def _naming_the_layer(name: str, inputs: str = "") -> Iterator[None]:
    """Adds to a Mistake from inside a model's layer the layer and the user's line that asked.

    Args:
        name: of the network.
        inputs: a sentence on what it is called on. With it, what one of Flax's layers refuses is a
            Mistake too: most likely it was made for inputs of another size.
    """
    try:
        yield
    except (Mistake, TypeError, ValueError, flax.errors.FlaxError) as error:
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        if not isinstance(error, Mistake) and not (inputs and _by_flax(frames)):
            raise
        layers = [frame.f_locals["self"] for frame in frames
                  if isinstance(frame.f_locals.get("self"), nnx.Module | linen.Module)]
        if not layers or str(error).startswith(f"{name} "):  # from the checks of this file
            raise
        root = next((one for one in layers if isinstance(one, nnx.Module)), None)
        paths = {id(part): path for path, part in nnx.iter_modules(root)} if root else {}
        paths |= {id(one): one.path for one in layers
                  if isinstance(one, linen.Module) and one.scope is not None}
        path = next((paths[id(one)] for one in reversed(layers) if paths.get(id(one))), ())
        lines = [
            f"{frame.f_code.co_filename}:{line}"
            for frame, line in traceback.walk_tb(error.__traceback__)
            if is_users(frame.f_code.co_filename)
        ]
        said = str(error)
        if not isinstance(error, Mistake):
            said = f"{' '.join(said.partition(' (https:')[0].split()).rstrip('.')}. {inputs}"
        raise Mistake(
            f"{name}{' at ' + _where(path) if path else ''}: {said}"
            f"{' Called at ' + lines[-1] + '.' if lines else ''}"
        ) from None


def _by_flax(frames: Sequence[FrameType]) -> bool:
    """Whether one of Flax's own lines raised, or asked JAX for what that raised."""
    files = [frame.f_code.co_filename for frame in frames]
    own = [file for file in files if not file.startswith((JAX, "<")) and "/jaxlib/" not in file]
    return bool(own) and own[-1].startswith(FLAX)


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
        if row.shape != (independence.GHOSTS, *running[path].shape):
            raise Mistake(
                f"{name} does not update the statistic {jax.tree_util.keystr(path)} in training; "
                "call GhostBatchNorm with train=True there (through Flax's bridge also with "
                "mutable=['batch_stats'])."
            )
    return found, shapes


def _check_apart(found: Tree, shapes: Tree, name: str) -> None:
    """Raises Mistake if a ghost batch's results were seen to depend on other examples."""
    if one := independence.mixing(found, shapes):
        raise Mistake(
            f"{name} mixes the examples of a batch{one.origin and ' at ' + one.origin}, so its "
            "result would depend on how a batch is cut over devices and microbatches; look at "
            "one example at a time, as layer or group norm does, or use GhostBatchNorm; draw "
            "random numbers from the keys the module is called with, one per example."
        )
