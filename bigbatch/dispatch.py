"""One update on its way to the devices, and whether the one before was well."""

import time
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np

from bigbatch import preemption, update


class NotFinite(ArithmeticError):
    """The loss or a parameter is no longer a finite number."""


def take_update(
    calls: list[Callable], state: update.State, sums: update.Sums | None, resident: Mapping,
    batches: Iterator[Mapping], hyper: tuple, watch: preemption.Watch, running: jax.Array | None,
) -> tuple[update.State, update.Sums | None, update.Metrics, float]:
    """Dispatches one update: one program, or a pass for each microbatch and the reduction.

    Args:
        calls: the programs of `compilation.keys_of`.
        state: is donated.
        sums: room for them, donated, where there are several passes.
        resident: see `feed.Feed`.
        batches: the update's microbatches.
        hyper: learning rate and momentum.
        watch: may raise its Stop before the program with the reduction.
        running: something of the update before, to wait for: the devices hold two microbatches.

    Returns:
        The new state, sums and metrics, and how many seconds the devices had nothing to do but
        wait for input, at most.
    """
    waited = 0.0

    def fetch() -> Mapping | None:
        nonlocal waited
        began = time.perf_counter()
        batch = next(batches, None)
        if running is None or running.is_ready():
            waited += time.perf_counter() - began
        return batch

    if len(calls) == 1:
        batch = fetch()
        watch.before_reduction()
        state, measured = calls[0](state, resident, batch, *hyper)
        return state, sums, measured, waited
    accumulate, apply = calls
    first = True
    while (batch := fetch()) is not None:
        watch.poll()
        sums, done = accumulate(state, sums, resident, batch, np.bool_(first))
        if running is not None:
            running.block_until_ready()
        running, first = done, False
    watch.before_reduction()
    state, measured = apply(state, sums, *hyper)
    return state, sums, measured, waited


def check_finite(taken: tuple[int, int, update.Metrics] | None) -> None:
    """Waits for an update, (its number, its first example, its metrics); None for none.

    Raises:
        NotFinite: if it broke down, naming it.
    """
    if taken and not bool(taken[2].finite):
        updates, start, measured = taken
        raise NotFinite(
            f"update {updates} (from example {start}) left a loss of {float(measured.loss):g} and "
            "parameters that are not all finite; the last checkpoint is from before it. A lower "
            "recipe.learning_rate or a warm-up usually helps."
        )
