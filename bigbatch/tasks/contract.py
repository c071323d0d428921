"""Finds the task that a config names, and holds its functions to what they promise.

Everything here is told from shapes, before anything is compiled. What each function of a task takes
and returns stands in `bigbatch.tasks`.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from bigbatch import dotted
from bigbatch.data.examples import TAKEN, Field, InMemory, Streamed
from bigbatch.mistake import Mistake

FUNCTIONS = ("fields", "prepare", "losses", "load")


class Task(NamedTuple):
    """The functions of a task, see `bigbatch.tasks`."""

    name: str  # its dotted path
    fields: Callable
    prepare: Callable
    losses: Callable
    load: Callable
    derived: Callable  # returns {} where the task has none
    about: Callable  # the same


def task_of(config: ConfigDict) -> Task:
    """The task of `config.task`.

    Raises:
        Mistake: if the path does not exist, or a function is missing there.
    """
    name = config.task
    found = dotted.resolve_task(name, "config.task")
    missing = [one for one in FUNCTIONS if not callable(getattr(found, one, None))]
    if missing:
        raise Mistake(
            f"config.task is {name!r}, which has no function {' and no '.join(missing)}; a task "
            f"has {', '.join(FUNCTIONS)} (docs/tasks.md)."
        )
    functions = (getattr(found, one) for one in FUNCTIONS)
    return Task(
        name, *functions, getattr(found, "derived", lambda config, means: {}),
        getattr(found, "about", lambda config: {}))


def fields_of(config: ConfigDict, task: Task) -> dict[str, Field]:
    """The fields of a task's examples.

    Raises:
        Mistake: if its `fields` returns something else, or a name that is taken.
    """
    fields = task.fields(config)
    if not isinstance(fields, Mapping) or not fields:
        raise Mistake(
            f"{task.name}.fields returned {_kind(fields)}; it must return a dict of Field(shape, "
            "dtype) by name, one for each array of an example."
        )
    for name, field in fields.items():
        if not isinstance(field, Field) or not isinstance(field.shape, tuple):
            raise Mistake(
                f"{task.name}.fields has {field!r} for {name!r}; it must be a "
                "bigbatch.tasks.Field(shape, dtype), where shape is a tuple."
            )
        if jax.dtypes.canonicalize_dtype(field.dtype) != field.dtype:
            raise Mistake(
                f"{task.name}.fields has {np.dtype(field.dtype)} for {name!r}, and JAX's 64-bit "
                "mode is off: take a type of 32 bits or less."
            )
        if name in TAKEN:
            raise Mistake(
                f"{task.name}.fields has the name {name!r}; {', '.join(TAKEN)} are taken.")
    return dict(fields)


def load(config: ConfigDict, task: Task) -> InMemory | Streamed:
    """Loads the data of a run.

    Raises:
        Mistake: what the task raises, or if the data does not agree with the config and the fields.
    """
    fields, data, options = fields_of(config, task), task.load(config), config.data
    wanted = Streamed if options.streaming else InMemory
    if not isinstance(data, wanted):
        raise Mistake(
            f"{task.name}.load returned {_kind(data)}, and config.data.streaming is "
            f"{options.streaming}; it must return a bigbatch.tasks.{wanted.__name__}."
        )
    for key, split in (("train", data.train), ("test", data.test)):
        if isinstance(data, InMemory):
            _check_arrays(task, fields, key, split)
            split = split[next(iter(fields))]
        stated = options[f"{key}_examples"]
        if len(split) != stated:
            raise Mistake(
                f"{task.name}.load has {len(split)} examples for {key}, but "
                f"config.data.{key}_examples is {stated}: set --config.data.{key}_examples="
                f"{len(split)}."
            )
    return data


def about(config: ConfigDict, task: Task) -> dict[str, Any]:
    """What a record of a run says of its data; see `bigbatch.tasks`.

    Raises:
        Mistake: what the task raises, or if its `about` returns no dict of JSON values.
    """
    found = task.about(config)
    try:
        if not isinstance(found, Mapping):
            raise TypeError(f"it is {_kind(found)}")
        return json.loads(json.dumps(dict(found)))
    except (TypeError, ValueError) as error:
        raise Mistake(
            f"{task.name}.about must return a dict of JSON values (texts, numbers, lists, dicts), "
            f"which a log can hold: {error}."
        ) from None


def _check_arrays(
    task: Task, fields: Mapping[str, Field], key: str, arrays: Mapping[str, np.ndarray]
) -> None:
    """Raises Mistake if the arrays of a split are not those that `fields` has."""
    names = list(arrays) if isinstance(arrays, Mapping) else [_kind(arrays)]
    if set(names) != set(fields):
        raise Mistake(
            f"{task.name}.load has {', '.join(map(str, names))} for {key}, and its fields are "
            f"{', '.join(fields)}: both must have the same names."
        )
    count = None
    for name, field in fields.items():
        array = arrays[name]
        if not isinstance(array, np.ndarray):
            raise Mistake(
                f"{task.name}.load has {_kind(array)} for {name} of {key}; it must be a NumPy array"
                ", examples on the first axis.")
        shape, wanted = array.shape[1:], np.dtype(field.dtype)
        fits = array.ndim > 0 and len(shape) == len(field.shape) and all(
            own == size or (field.or_larger and own > size)
            for own, size in zip(shape, field.shape, strict=True))
        if not fits or array.dtype != wanted:
            least = " or larger" * field.or_larger
            raise Mistake(
                f"{task.name}.load has {array.dtype} {array.shape} for {name} of {key}; by its "
                f"fields each example is {wanted} {field.shape}{least}."
            )
        count = len(array) if count is None else count
        if len(array) != count:
            raise Mistake(
                f"{task.name}.load has {len(array)} of {name} for {key}, but {count} of "
                f"{next(iter(fields))}: one for each example."
            )


def prepare(
    config: ConfigDict, task: Task, fields_B: Mapping[str, jax.Array], keys_B: jax.Array,
    train: bool,
) -> tuple[Any, Any]:
    """What the network is called with, and what `losses` is; see `bigbatch.tasks`.

    Raises:
        Mistake: if the task's `prepare` returns something else.
    """
    pair = task.prepare(config, fields_B, keys_B, train)
    if not isinstance(pair, tuple) or len(pair) != 2:
        raise Mistake(
            f"{task.name}.prepare returned {_kind(pair)}; it must return a pair (inputs, targets)."
        )
    examples = keys_B.shape[0]  # may be a symbol, in an export
    for what, tree in zip(("inputs", "targets"), pair, strict=True):
        for leaf in jax.tree.leaves(tree):
            if getattr(leaf, "shape", ())[:1] != (examples,):
                raise Mistake(
                    f"{task.name}.prepare returned {what} of shape {jnp.shape(leaf)} for {examples}"
                    " examples; the first axis must be that of the examples."
                )
    return pair


def losses(
    config: ConfigDict, task: Task, outputs_B: Any, targets_B: Any, examples: int
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """The values and weights of each quantity, by name.

    Args:
        config: of the run.
        task: its task.
        outputs_B: what the network returned.
        targets_B: what `prepare` returned.
        examples: B.

    Raises:
        Mistake: if the task's `losses` returns something else.
    """
    found = task.losses(config, outputs_B, targets_B)
    if not isinstance(found, Mapping) or "loss" not in found:
        got = ", ".join(map(str, found)) if isinstance(found, Mapping) else _kind(found)
        raise Mistake(
            f"{task.name}.losses returned {got or 'nothing'}; it must return a dict of (values, "
            "weights) by name, and 'loss' must be there."
        )
    wide = jnp.promote_types(config.dtype, jnp.float32)
    for name, pair in found.items():
        if not isinstance(name, str) or not isinstance(pair, tuple | list) or len(pair) != 2:
            raise Mistake(
                f"{task.name}.losses has {_kind(pair)} for {name!r}; it must be a pair (values, "
                "weights)."
            )
        for what, array in zip(("values", "weights"), pair, strict=True):
            if getattr(array, "shape", None) != (examples,):
                shape = getattr(array, "shape", type(array).__name__)
                raise Mistake(
                    f"{task.name}.losses has {what} of shape {shape} for {name!r}; it must be "
                    f"({examples},), one for each example."
                )
            if not jnp.issubdtype(array.dtype, jnp.floating) or (
                    jnp.promote_types(array.dtype, wide) != array.dtype):
                raise Mistake(
                    f"{task.name}.losses has {what} in {array.dtype} for {name!r}; where "
                    f"config.dtype is {config.dtype} they are added up in {wide}."
                )
    return {name: tuple(pair) for name, pair in found.items()}


def _kind(value: Any) -> str:
    if isinstance(value, tuple | list | Mapping):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"
