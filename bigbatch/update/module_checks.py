"""Whether a user's module keeps to the model contract: its arguments, layers, variables and errors.

All is told before anything is compiled; `independence` has what its operations show.
"""

import contextlib
import inspect
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import FrameType
from typing import Any

import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from ml_collections import ConfigDict

from bigbatch.mistake import Mistake
from bigbatch.update.user_lines import FLAX, JAX, is_users

CONSTANTS = (
    "Create constants where they are used: inside __call__, or as NumPy arrays outside of the "
    "class."
)
INSTEAD = {
    "BatchNorm": "bigbatch.models.normalization.GhostBatchNorm",
    "Dropout": "bigbatch.models.dropout.dropout",
}
ATTENTIONS = (nnx.MultiHeadAttention, linen.MultiHeadDotProductAttention)


def _where(path: tuple) -> str:
    return ".".join(map(str, path)) or "the module itself"


def check_arguments(function: Callable, arguments: Mapping[str, Any], name: str) -> None:
    """Raises Mistake if `config.network` cannot be called with the keys of `config.model`."""
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


def check_callable(module: Any, name: str) -> None:
    """Raises Mistake for what is no module, or is not called as (inputs, train, keys)."""
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


def check_constants(module: nnx.Module, name: str) -> None:
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
                    f"{CONSTANTS}"
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


def _refuse_layer(layer: nnx.Module | linen.Module, path: tuple, name: str) -> None:
    """Raises Mistake for Flax's own BatchNorm and Dropout, and for attention that drops out."""
    if isinstance(layer, ATTENTIONS) and layer.dropout_rate:
        raise Mistake(
            f"{name} holds {type(layer).__name__} at {_where(path)} with dropout_rate="
            f"{layer.dropout_rate}, which draws one mask for a whole microbatch; give it "
            f"dropout_rate=0.0 and call {INSTEAD['Dropout']}(x, rate, keys, train, tag) on its "
            "result, which takes the keys the module is called with. For dropout of the attention "
            "weights call flax.nnx.dot_product_attention(..., dropout_rng=key) of one example "
            "under jax.vmap over the examples and their keys."
        )
    for library, module in (("nnx", nnx), ("linen", linen)):
        for kind, instead in INSTEAD.items():
            if isinstance(layer, getattr(module, kind)) and getattr(layer, "rate", None) != 0:
                raise Mistake(
                    f"{name} holds flax.{library}.{kind} at {_where(path)}, whose result depends "
                    f"on how a batch is cut over devices and microbatches; use {instead} instead."
                )


def watch_linen(layers: dict[tuple, str], name: str) -> Callable:
    """Makes the interceptor that notes in `layers` each Linen layer called, if it is allowed."""
    def watch(call: Callable, arguments: tuple, keywords: dict, context: Any) -> Any:
        layer = context.module
        _refuse_layer(layer, layer.path, name)
        # A ToLinen wraps an NNX layer inside a Linen module.
        layers[layer.path] = getattr(layer, "nnx_class", type(layer)).__name__
        return call(*arguments, **keywords)

    return watch


def check_modules(module: nnx.Module, name: str) -> None:
    """Raises Mistake if a module holds a layer whose result depends on how a batch is cut."""
    for path, part in nnx.iter_modules(module):
        _refuse_layer(part, path, name)


def check_state(
    params: nnx.State, batch_stats: nnx.State, rest: nnx.State, config: ConfigDict
) -> None:
    """Raises Mistake for variables that no run keeps, or of another type than parameters have."""
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
            f"GhostBatchNorm's statistics are kept from update to update. {CONSTANTS}"
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
def naming_the_layer(name: str, inputs: str = "") -> Iterator[None]:
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
