"""The programs of a run: first those that it begins with, then those of each phase in turn."""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from bigbatch.job.devices import place, shape_of
from bigbatch.job.preemption import Watch
from bigbatch.programs import compilation, dispatch, origin
from bigbatch.programs.compilation import EVALUATE, INIT, Program
from bigbatch.programs.lowering import lowering
from bigbatch.schedule.layout import Layout
from bigbatch.storage.bucket_programs import BucketPrograms
from bigbatch.update import initial_weights, network, sharding, update


class Ready(NamedTuple):
    """The compiled programs for the updates of a phase."""

    calls: list[Callable]  # for `dispatch.take_update`
    compile_seconds: list[float]  # one for each of `calls`
    waited_seconds: float  # how long training waited for them
    flops: float | None  # of an update on all devices; None if they were not counted
    # {program: {"from", "seconds"}} of those that are ready and in no earlier `Ready`
    obtained: Mapping[str, Mapping[str, str | float]]


class Programs:
    """Lowers and compiles a run's programs, in the order in which they are needed."""

    def __init__(
        self, config: ConfigDict, net: network.Network, mesh: Mesh, layouts: Sequence[Layout],
        resident: Mapping, test: Mapping, counted: bool, begin_with: Mapping | None = None,
        bucket: BucketPrograms | None = None, ghosts: Layout | None = None,
    ):
        """Args:
        config: of the run.
        net: its network.
        mesh: the devices.
        layouts: one for each phase still to run, in order.
        resident: see `feed.Feed`.
        test: see there.
        counted: whether to count floating-point operations.
        begin_with: the weights of a new run, see `initial_weights.read`; none if not given.
        bucket: see `origin.obtain`.
        ghosts: see `compilation.compile_order`.
        """
        self._config, self._net, self._mesh = config, net, mesh
        self._layouts, self._resident, self._test = layouts, resident, test
        self._counted, self._begin_with = counted, begin_with or {}
        self._ghosts = ghosts
        self._bucket = bucket
        self._futures: dict[Program, Future] = {}
        self._told: set[Program] = set()  # of which a `Ready` said where they came from

    def begin(
        self, state: update.State, watch: Watch
    ) -> tuple[update.State, update.Sums | None]:
        """Lowers all programs, and waits until those that the run begins with are compiled.

        Args:
            state: on the devices; for a new run its shapes, from which its initial state is made.
            watch: polled while waiting.

        Returns:
            The state, and `dispatch.room_for_sums`, which is None if nothing takes several passes.

        Raises:
            preemption.Stop: see `Watch.poll`.
        """
        is_new = isinstance(jax.tree.leaves(state)[0], jax.ShapeDtypeStruct)
        shapes = jax.tree.map(shape_of, (state, self._resident, self._test))
        lower = lowering(self._config, self._net, self._mesh, *shapes)
        first, later = compilation.compile_order(self._layouts, is_new, self._ghosts)
        self._futures = compilation.compile_ahead(
            lower, first + later, self._counted, watch.poll,
            partial(origin.obtain, bucket=self._bucket))
        if is_new:
            watch.wait(self._futures[INIT].done)
            state = self._initial(state, watch)
        several = any(layout.microbatches > 1 for layout in self._layouts) or self._ghosts
        sums = dispatch.room_for_sums(self._config, self._net, self._mesh) if several else None
        watch.wait(lambda: all(self._futures[program].done() for program in first))
        for program in first:
            self._futures[program].result()
        return state, sums

    def _initial(self, shapes: update.State, watch: Watch) -> update.State:
        """The state before the first update, on the devices."""
        call, seed = self._futures[INIT].result().call, np.uint32(self._config.seed)
        if sharding.is_split(shapes):
            watch.before_reduction()  # a program of all processes, as one with a reduction is
            initial = call(seed)
        else:
            initial = jax.tree.map(np.asarray, call(seed))
        initial = initial_weights.put(initial, self._begin_with)
        self._begin_with = {}  # which an update takes over
        return place(initial, jax.tree.map(lambda leaf: leaf.sharding, shapes))

    def wait_for(
        self, layout: Layout, watch: Watch, say: Callable[[], None] = lambda: None
    ) -> Ready:
        """Waits for the programs of updates with this layout, and returns them.

        Args:
            layout: of the phase that begins.
            watch: polled while waiting.
            say: called before a wait, if there is one.

        Raises:
            preemption.Stop: see `Watch.poll`.
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
            self._obtained(),
        )

    def measure(self) -> list[Callable]:
        """The compiled programs that measure the noise scale, for `dispatch.measure`."""
        wanted = compilation.measuring_programs(self._ghosts)
        return [self._futures[program].result().call for program in wanted]

    def _obtained(self) -> dict[str, dict[str, str | float]]:
        """See `Ready.obtained`."""
        new = [program for program, future in self._futures.items()
               if program not in self._told and future.done() and not future.exception()]
        self._told.update(new)
        ready = {program: self._futures[program].result() for program in new}
        return {str(program): {"from": one.origin.value, "seconds": round(one.seconds, 3)}
                for program, one in ready.items()}

    def evaluate(self) -> Callable:
        """The compiled program for `evaluation.whole_test_set`; call `begin` first."""
        return self._futures[EVALUATE].result().call
