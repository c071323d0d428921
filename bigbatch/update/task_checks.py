"""Whether a task keeps to its contract, told from its functions as they are traced.

Nothing is computed or compiled. `independence` says what can be told in this way.
"""

from collections.abc import Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from bigbatch.mistake import Mistake
from bigbatch.tasks import contract
from bigbatch.tasks.contract import Task
from bigbatch.update import independence

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


def measured(
    config: ConfigDict, task: Task, outputs: Any, targets: Any, examples: int, may_mix: bool = False
) -> tuple[str, ...]:
    """The names of what `losses` measures and a run reports.

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


def described(task: Task, inputs: Any) -> str:
    """A sentence on what the network is called with, and which keys say so."""
    shapes = ", ".join(f"{leaf.dtype} {leaf.shape[1:]}" for leaf in jax.tree.leaves(inputs))
    return f"It is given {shapes} of each example, as config.data and the task {task.name} say."
