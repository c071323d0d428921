"""A run's programs: what it begins with, then each phase's as the phase is entered."""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from bigbatch.job.devices import place, replicated, shape_of
from bigbatch.job.preemption import Watch
from bigbatch.programs import compilation, dispatch
from bigbatch.programs.compilation import EVALUATE, INIT, Program
from bigbatch.programs.lowering import lowering
from bigbatch.schedule.layout import Layout
from bigbatch.update import network, update


class Ready(NamedTuple):
    """The programs of a phase's updates, ready to call."""

    calls: list[Callable]  # for `dispatch.take_update`
    compile_seconds: list[float]  # of each
    waited_seconds: float  # for the compiler
    flops: float | None  # of an update on all devices; None where they were not counted


class Programs:
    """Lowers and compiles a run's programs, in the order in which they are needed."""

    def __init__(
        self, config: ConfigDict, net: network.Network, mesh: Mesh, layouts: Sequence[Layout],
        resident: Mapping, test: Mapping, counted: bool,
    ):
        """Args:
        config: of the run.
        net: its network.
        mesh: the devices.
        layouts: of the phases still to run, in order.
        resident: see `feed.Feed`.
        test: see there.
        counted: whether to count operations.
        """
        self._config, self._net, self._mesh = config, net, mesh
        self._layouts, self._resident, self._test = layouts, resident, test
        self._counted = counted
        self._futures: dict[Program, Future] = {}

    def begin(
        self, state: update.State, watch: Watch
    ) -> tuple[update.State, update.Sums | None]:
        """Lowers all, and waits until those that the run begins with are compiled.

        Args:
            state: on the devices; for a new run its shapes, and the state is then drawn.
            watch: polled meanwhile.

        Returns:
            The state, and room for the sums of several passes where a phase has them.
        """
        is_new = isinstance(jax.tree.leaves(state)[0], jax.ShapeDtypeStruct)
        shapes = jax.tree.map(shape_of, (state, self._resident, self._test))
        lower = lowering(self._config, self._net, self._mesh, *shapes)
        first, later = compilation.compile_order(self._layouts, is_new)
        self._futures = compilation.compile_ahead(
            lower, first + later, self._counted, watch.poll)
        if is_new:
            watch.wait(self._futures[INIT].done)
            drawn = self._futures[INIT].result().call(np.uint32(self._config.seed))
            state = place(jax.tree.map(np.asarray, drawn), replicated(self._mesh))
        several = any(layout.microbatches > 1 for layout in self._layouts)
        sums = dispatch.room_for_sums(state, self._mesh) if several else None
        watch.wait(lambda: all(self._futures[program].done() for program in first))
        for program in first:
            self._futures[program].result()
        return state, sums

    def wait_for(
        self, layout: Layout, watch: Watch, say: Callable[[], None] = lambda: None
    ) -> Ready:
        """The programs of updates with this layout, once they are compiled.

        Args:
            layout: of the phase that begins.
            watch: polled meanwhile.
            say: called first if there is something to wait for.
        """
        began = time.perf_counter()
        futures = [self._futures[program] for program in compilation.programs_of(layout)]
        if not all(future.done() for future in futures):
            say()
        watch.wait(lambda: all(future.done() for future in futures))
        compiled = [future.result() for future in futures]
        return Ready(
            [program.call for program in compiled],
            [round(program.seconds, 3) for program in compiled],
            round(time.perf_counter() - began, 3),
            compilation.update_flops(compiled, layout),
        )

    def evaluate(self) -> Callable:
        """The program of an evaluation; see `evaluation.whole_test_set`."""
        return self._futures[EVALUATE].result().call
