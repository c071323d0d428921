"""Whether a task keeps to its contract, told from its functions as they are traced.

Nothing is computed or compiled. `independence` says what can be told in this way.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from bigbatch.mistake import Mistake
from bigbatch.tasks import contract
from bigbatch.tasks.contract import Task
from bigbatch.update import dependence, independence

OF_A_GHOST = "or at the config.ghost_size neighbours of a ghost batch"


def keys(examples: int) -> Any:
    """The shape of one random key an example."""
    return jax.eval_shape(lambda: jax.random.split(jax.random.key(0), examples))


def prepared(config: ConfigDict, task: Task, examples: int) -> tuple[Any, Any]:
    """The shapes of a microbatch's inputs and targets, in training.

    Args:
        config: of the run.
        task: its task.
        examples: of two ghost batches together.

    Raises:
        Mistake: if `prepare` returns something else, or mixes these ghost batches.
    """
    fields = {name: jax.ShapeDtypeStruct((examples, *field.shape), field.dtype)
              for name, field in contract.fields_of(config, task).items()}

    def call(_: None, fields: Mapping[str, Any], keys: Any) -> tuple[Any, Any]:
        return contract.prepare(config, task, fields, keys, True)

    shapes, found = independence.trace(call, None, fields, keys(examples))
    independence.refuse_mixing(f"{task.name}.prepare", found, shapes, OF_A_GHOST)
    if not jax.tree.leaves(shapes[0]):
        raise Mistake(f"{task.name}.prepare returned no inputs for the network.")
    return shapes


def reported(
    config: ConfigDict, task: Task, outputs: Any, targets: Any, examples: int, may_mix: bool = False
) -> tuple[str, ...]:
    """The names of what a run reports of `losses`.

    Args:
        config: of the run.
        task: its task.
        outputs: shapes of what the network returns.
        targets: shapes of the targets.
        examples: of two ghost batches together.
        may_mix: see `network.build`.

    Raises:
        Mistake: if `losses` returns something else, or mixes these ghost batches.
    """
    def call(_: None, outputs: Any, targets: Any) -> Any:
        return contract.losses(config, task, outputs, targets, examples)

    shapes, found = independence.trace(call, None, outputs, targets)
    if not may_mix:
        independence.refuse_mixing(
            f"{task.name}.losses", found, shapes, OF_A_GHOST)
    return tuple(sorted(shapes.keys() - {"objective"}))


def check_evaluation(
    config: ConfigDict, task: Task, name: str, apply: Callable, params: Any, batch_stats: Any
) -> None:
    """Traces an evaluation, in which each example stands alone.

    Evaluated are the examples of the test set in any number on any device, beside padding, and not
    whole ghost batches.

    Args:
        config: of the run.
        task: its task.
        name: of the network.
        apply: see `network.Network.apply`.
        params: shapes of the parameters.
        batch_stats: the same of the running statistics.

    Raises:
        Mistake: if a call with as many examples as are traced raises an exception, or what it
            reports of one was seen to depend on another.
    """
    examples = dependence.GHOSTS  # each takes the place of a ghost batch
    fields = {key: jax.ShapeDtypeStruct((examples, *field.shape), field.dtype)
              for key, field in contract.fields_of(config, task).items()}

    def call(constants: tuple[Any, Any], fields: Mapping[str, Any], keys: Any) -> Any:
        inputs, targets = contract.prepare(config, task, fields, keys, False)
        outputs, _ = apply(*constants, inputs, False, keys)
        found = contract.losses(config, task, outputs, targets, examples)
        return {key: pair for key, pair in found.items() if key != "objective"}

    what = f"{name} with the task {task.name}, in evaluation,"
    try:
        shapes, found = independence.trace(call, (params, batch_stats), fields, keys(examples))
    except Mistake:
        raise
    except Exception as error:
        raise Mistake(
            f"{what} fails for {examples} examples: {type(error).__name__}: "
            f"{' '.join(str(error).split())[:300]}. Evaluated are examples in any number, not whole"
            f" ghost batches of {config.ghost_size}, and `losses` is called then too."
        ) from error
    independence.refuse_mixing(
        what, found, shapes, "and at its neighbours in a ghost batch in training alone (`if train`;"
        " `losses` may in its objective, where it has whole ghost batches)")


def described(task: Task, inputs: Any) -> str:
    """A sentence on what the network is called with, and which keys say so."""
    shapes = ", ".join(f"{leaf.dtype} {leaf.shape[1:]}" for leaf in jax.tree.leaves(inputs))
    return f"It is given {shapes} of each example, as config.data and the task {task.name} say."
