"""One update on its way to the devices."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from bigbatch.job.devices import cut, place, replicated
from bigbatch.update import update


def take_update(
    calls: Sequence[Callable], state: update.State, sums: update.Sums | None, resident: Mapping,
    batches: Iterator[Mapping], rates: tuple[jax.Array, jax.Array],
    before_pass: Callable[[], None] = lambda: None,
    before_reduction: Callable[[], None] = lambda: None, running: jax.Array | None = None,
) -> tuple[update.State, update.Sums | None, update.Metrics, float]:
    """Dispatches one update: one program, or a pass for each microbatch and the reduction.

    Args:
        calls: the programs of `compilation.programs_of`, or functions that do the same.
        state: is donated.
        sums: see `room_for_sums`; donated, where there are several passes.
        resident: see `feed.Feed`.
        batches: the update's microbatches.
        rates: learning rate and momentum; see `as_rates`.
        before_pass: called before each of several passes; what it raises passes through.
        before_reduction: the same, before the program with the reduction.
        running: something of the update before, to wait for: the devices hold two microbatches.

    Returns:
        The new state, sums and metrics, and an upper bound on the seconds that the devices were
        idle for want of input.
    """
    fed = _Input(batches, running)
    if len(calls) == 1:
        batch = fed.next()
        before_reduction()
        state, measured = calls[0](state, resident, batch, *rates)
        return state, sums, measured, fed.waited
    accumulate, apply = calls
    first = True
    while (batch := fed.next()) is not None:
        before_pass()
        sums, done = accumulate(state, sums, resident, batch, np.bool_(first))
        if fed.running is not None:
            fed.running.block_until_ready()
        fed.running, first = done, False
    before_reduction()
    state, measured = apply(state, sums, *rates)
    return state, sums, measured, fed.waited


class _Input:
    """Microbatches, and how long the devices were idle while one was made."""

    def __init__(self, batches: Iterator[Mapping], running: jax.Array | None):
        self._batches, self.running, self.waited = batches, running, 0.0

    def next(self) -> Mapping | None:
        began = time.perf_counter()
        batch = next(self._batches, None)
        if self.running is None or self.running.is_ready():
            self.waited += time.perf_counter() - began
        return batch


def as_rates(
    mesh: Mesh, dtype: np.dtype, learning_rate: float, momentum: float
) -> tuple[jax.Array, jax.Array]:
    """Learning rate and momentum on the devices, in the parameters' type."""
    number = dtype.type
    return place((number(learning_rate), number(momentum)), replicated(mesh))


def room_for_sums(state: update.State, mesh: Mesh) -> update.Sums:
    """What the passes of an update add up in, on each device."""
    shapes = update.abstract_sums(state, mesh)
    return jax.jit(
        lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes),
        out_shardings=cut(mesh),
    )()
