"""Dispatches the programs of one update to the devices."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from bigbatch.job.devices import cut, place, replicated
from bigbatch.schedule.rates import Rates
from bigbatch.update import network, noise, update


def take_update(
    calls: Sequence[Callable], state: update.State, sums: update.Sums | None, resident: Mapping,
    batches: Iterator[Mapping], rates: Rates,
    before_pass: Callable[[], None] = lambda: None,
    before_reduction: Callable[[], None] = lambda: None, running: jax.Array | None = None,
    started: Callable[[], None] = lambda: None, landed: Callable[[float], None] = lambda _: None,
) -> tuple[update.State, update.Sums | None, update.Metrics, float]:
    """Dispatches one update: one program, or one for each microbatch and then the reduction.

    Args:
        calls: the compiled programs of `compilation.programs_of`, or equivalent functions.
        state: before the update; its arrays are donated.
        sums: see `room_for_sums`; their arrays are donated if there are several passes.
        resident: see `feed.Feed`.
        batches: the update's microbatches.
        rates: as arrays on the devices; see `as_rates`.
        before_pass: called before each of several passes; its exceptions pass through.
        before_reduction: the same, before the program with the reduction.
        running: an output of the previous update, or None. After each of several passes is
            dispatched, the program before it is waited for, so that the devices hold two
            microbatches at most.
        started: called when the input is there and the first program is dispatched.
        landed: called when the previous update is found to have ended, with the seconds of this
            call up to then in which the devices were idle for want of input. Only where there are
            several passes: with one, nothing is waited for here.

    Returns:
        The new state, sums and metrics, and an upper bound on the seconds that the devices were
        idle for want of input.
    """
    microbatches = _Input(batches, running)
    if len(calls) == 1:
        batch = microbatches.next()
        before_reduction()
        started()
        state, metrics = calls[0](state, resident, batch, rates)
        return state, sums, metrics, microbatches.waited
    accumulate, apply = calls
    first = True
    while (batch := microbatches.next()) is not None:
        before_pass()
        if first:
            started()
        sums, done = accumulate(state, sums, resident, batch, np.bool_(first))
        if microbatches.running is not None:
            microbatches.running.block_until_ready()
            if first:
                landed(microbatches.waited)
        microbatches.running, first = done, False
    before_reduction()
    state, metrics = apply(state, sums, rates)
    return state, sums, metrics, microbatches.waited


def measure(
    calls: Sequence[Callable], state: update.State, sums: update.Sums, resident: Mapping,
    batches: Iterator[Mapping],
) -> tuple[update.Sums, noise.Measured]:
    """Measures the noise scale at a state that is not changed, and waits for it.

    Args:
        calls: the compiled programs of `compilation.measuring_programs`.
        state: whose gradient is measured.
        sums: see `room_for_sums`; their arrays are donated.
        resident: see `feed.Feed`.
        batches: the microbatches, of one ghost batch a device.
    """
    accumulate, finish = calls
    for number, batch in enumerate(batches):
        sums, done = accumulate(state, sums, resident, batch, np.bool_(number == 0))
        done.block_until_ready()
    return sums, jax.device_get(finish(sums))


class _Input:
    """The microbatches of an update, and the seconds that the devices were idle for want of one.

    Attributes:
        running: an output of the program dispatched last; None if there is none.
        waited: upper bound on these seconds.
    """

    def __init__(self, batches: Iterator[Mapping], running: jax.Array | None):
        self._batches, self.running, self.waited = batches, running, 0.0

    def next(self) -> Mapping | None:
        began = time.perf_counter()
        batch = next(self._batches, None)
        if self.running is None or self.running.is_ready():
            self.waited += time.perf_counter() - began
        return batch


def as_rates(mesh: Mesh, dtype: np.dtype, rates: Rates) -> Rates:
    """The rates as scalar arrays on the devices, of the parameters' type `dtype`."""
    return place(jax.tree.map(dtype.type, rates), replicated(mesh))


def room_for_sums(config: ConfigDict, net: network.Network, mesh: Mesh) -> update.Sums:
    """Zero arrays in which the passes of an update accumulate their sums, one set a device."""
    shapes = update.abstract_sums(config, net, mesh)
    return jax.jit(
        lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes),
        out_shardings=cut(mesh),
    )()
