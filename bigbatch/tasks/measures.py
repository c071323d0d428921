"""What the losses of a task come to: added up over examples, by name, and as a log has them."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from bigbatch.tasks import contract
from bigbatch.tasks.contract import Task

Reported = dict[str, tuple[Any, Any]]  # {name: (sum of values, sum of weights)}, scalars


class Added(NamedTuple):
    """What the losses of some examples add up to."""

    objective: jax.Array  # what is differentiated
    weight: jax.Array  # of it
    weights_B: jax.Array  # of each example in it
    reported: Reported


def add_up(
    config: ConfigDict, task: Task, outputs_B: Any, targets_B: Any, counts_B: jax.Array
) -> Added:
    """The sums over the examples of a microbatch that count.

    Args:
        config: of the run.
        task: its task.
        outputs_B: what the network returned.
        targets_B: what the task prepared.
        counts_B: bool; False where an example adds nothing, whatever comes out of it.

    Raises:
        Mistake: see `contract.losses`.
    """
    examples = len(counts_B)

    def masked(array: jax.Array, elsewhere: jax.Array | float = 0) -> jax.Array:
        return jnp.where(counts_B.reshape(-1, *[1] * (array.ndim - 1)), array, elsewhere)

    # To mask the values alone is not enough: if one is not finite in a padding slot, 0 times its
    # derivative is nan. So derivatives by the outputs are masked too. The outputs themselves are
    # not: where they are many, as the logits of tokens, another pass over them takes time.
    outputs_B = jax.tree.map(
        lambda leaf: masked(leaf, jax.lax.stop_gradient(leaf))
        if getattr(leaf, "shape", ())[:1] == (examples,) else leaf, outputs_B)
    found = contract.losses(config, task, outputs_B, targets_B, examples)
    weights_B = masked(found.get("objective", found["loss"])[1])
    sums = {name: (jnp.sum(masked(values)), jnp.sum(masked(weights)))
            for name, (values, weights) in found.items()}
    objective, weight = sums.pop("objective", sums["loss"])
    return Added(objective, weight, weights_B, sums)


def results(
    config: ConfigDict, task: Task, means: Mapping[str, float], before: str, after: str = ""
) -> dict[str, float]:
    """Means as a line of a log has them: "loss" first, the others by their names.

    Args:
        config: of the run.
        task: its task.
        means: by name; nan for what has no weight.
        before: what the names begin with, such as "train_".
        after: what they end with.
    """
    names = ["loss", *sorted(means.keys() - {"loss"})]  # in any program they come sorted
    means = {name: float(means[name]) for name in names}
    found = means | {name: float(value) for name, value in task.derived(config, means).items()}
    return {f"{before}{name}{after}": value for name, value in found.items()}


def ratio(value: float, weight: float) -> float:
    """A mean from its sums; nan where nothing weighs."""
    return value / weight if weight else math.nan
