"""A schedule in Optax: how many micro-batches `MultiSteps` adds up, and the rates, by update."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from bigbatch import schedule
from bigbatch.adapters import batches
from bigbatch.schedule import Rates, Table

ByUpdate = Callable[[jax.typing.ArrayLike], jax.Array]


def every_k(table: Table, micro_batch: int) -> ByUpdate:
    """How many micro-batches each update takes, for `MultiSteps(every_k_schedule=...)`.

    `MultiSteps` takes the mean over them, which is the mean over the batch as all micro-batches
    have one size.

    Args:
        table: of the run.
        micro_batch: the examples of one call of `MultiSteps.update`.

    Raises:
        Mistake: if a batch is no multiple of it.
    """
    counts = np.array(batches.micro_batches(table, micro_batch), np.int32)
    starts = np.array([phase.start_update for phase in table.phases], np.int32)
    return lambda update: jnp.asarray(counts)[
        jnp.searchsorted(jnp.asarray(starts), update, side="right") - 1]


def rate_schedules(table: Table) -> Rates:
    """For each of the rates its function of the update's number, as Optax's schedules are.

    For `inject_hyperparams`, whose count goes up once an update, also inside of `MultiSteps`. The
    values of all updates are constants of the compiled program: 8 bytes an update and rate.
    """
    columns = np.array([row.rates for row in schedule.rows(table)]).T
    return Rates(*(partial(_value, column) for column in columns))


def position(table: Table, micro_batch: int, update: int, micro_step: int) -> int:
    """The examples seen at a point of a run, from which its data go on.

    Args:
        table: of the run.
        micro_batch: the examples of one call of `MultiSteps.update`.
        update: `gradient_step` of the state of `MultiSteps`.
        micro_step: its `mini_step`.
    """
    start = schedule.row(table, update).start if update < table.updates else table.examples
    return start + micro_step * micro_batch


def _value(column: np.ndarray, update: jax.typing.ArrayLike) -> jax.Array:
    return jnp.asarray(column)[jnp.minimum(update, len(column) - 1)]
