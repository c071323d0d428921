"""Compiles the programs of all phases in the background, before they are needed.

A program is identified by its shapes and not by a phase: two phases with the same number of slots
share one program. All programs are lowered at the start, because tracing holds Python's interpreter
lock and would slow training down later. A background thread compiles each one as soon as it is
lowered. Training waits only for the programs of its first phase, of the evaluation and of the
largest microbatch, with which it would run out of memory if it ever does. The others are compiled
during training, in the order in which they are needed.
"""

import atexit
import enum
import gc
import itertools
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import jax

from bigbatch.job import jax_private
from bigbatch.programs import origin, program_cache
from bigbatch.schedule.layout import Layout


class Kind(enum.Enum):
    """The kinds of programs."""

    INIT = "init"  # computes the initial state of a new run
    UPDATE = "update"  # a whole update, in one pass
    ACCUMULATE = "accumulate"  # one of several passes of an update
    APPLY = "apply"  # the reduction and the optimizer, after the passes
    EVALUATE = "evaluate"  # one batch of the test set
    MEASURE = "measure"  # the noise scale, of what passes have added up


class Program(NamedTuple):
    """What identifies a program of a run."""

    kind: Kind
    slots: int = 0  # slots a device in one pass, for UPDATE and ACCUMULATE

    def __str__(self) -> str:
        return f"{self.kind.value} {self.slots}" if self.slots else self.kind.value


INIT, APPLY, EVALUATE = Program(Kind.INIT), Program(Kind.APPLY), Program(Kind.EVALUATE)
MEASURE = Program(Kind.MEASURE)


def programs_of(layout: Layout) -> tuple[Program, ...]:
    """The programs that an update with this layout calls."""
    if layout.microbatches == 1:
        return (Program(Kind.UPDATE, layout.slots),)
    return (Program(Kind.ACCUMULATE, layout.slots), APPLY)


def measuring_programs(layout: Layout) -> tuple[Program, ...]:
    """The programs that measure the noise scale of ghost batches with this layout."""
    return (Program(Kind.ACCUMULATE, layout.slots), MEASURE)


class Compiled(NamedTuple):
    """A compiled program."""

    call: Any
    seconds: float  # that compiling or loading it took
    flops: float | None  # see `count_flops`; None if they were not counted
    origin: origin.Origin


def compile_ahead(
    lower: Callable[[Program], jax.stages.Lowered], order: Sequence[Program], counted: bool = False,
    before_each: Callable[[], None] = lambda: None,
    obtain: Callable[[jax.stages.Lowered], tuple[Any, origin.Origin]] = origin.obtain,
) -> dict[Program, Future]:
    """Lowers all programs, and compiles them in a background thread.

    Args:
        lower: lowers one program.
        order: the programs, in the order in which they are to be compiled.
        counted: whether to count their operations, which takes a part of a second each.
        before_each: called before each program is lowered; its exceptions pass through.
        obtain: makes a program of what is lowered, see `origin.obtain`.

    Returns:
        A future of `Compiled` for each program, once all are lowered. Its `result` raises the
        compiler's errors.
    """
    futures = {program: Future() for program in order}
    lowered: queue.SimpleQueue[tuple[Program, jax.stages.Lowered] | None] = queue.SimpleQueue()
    ended = threading.Event()

    def compile_all() -> None:
        while (item := lowered.get()) and not ended.is_set():
            program, one_lowered = item
            started = time.perf_counter()
            try:
                compiled, came_from = obtain(one_lowered)
                program_cache.seal()
                seconds = time.perf_counter() - started
                flops = count_flops(one_lowered) if counted else None
            except BaseException as error:
                futures[program].set_exception(error)
            else:
                futures[program].set_result(Compiled(compiled, seconds, flops, came_from))

    # A daemon thread, so that a run that stops does not wait for programs it no longer needs. But
    # when Python itself ends (a script, a notebook), `end` waits for the program being compiled, as
    # ending a thread inside the compiler would abort the process.
    thread = threading.Thread(target=compile_all, name="compile", daemon=True)
    thread.start()

    def end() -> None:
        ended.set()
        lowered.put(None)
        thread.join()

    atexit.register(end)
    collecting = gc.isenabled()
    gc.disable()  # garbage collection would take a sixth of the time, as tracing's objects persist
    try:
        for program in order:
            before_each()
            lowered.put((program, lower(program)))
    finally:
        lowered.put(None)
        if collecting:
            gc.enable()
    return futures


def compile_order(
    layouts: Sequence[Layout], begins: bool = False, ghosts: Layout | None = None
) -> tuple[list[Program], list[Program]]:
    """Which programs to compile before the first update, and which later.

    Args:
        layouts: one for each phase still to run, in order; empty if no update is left.
        begins: whether the run is new, so that INIT is needed.
        ghosts: of the ghost batches whose noise scale is measured one by one; None if none are.

    Returns:
        (the programs to wait for before the first update, the others), each in order.
    """
    in_order = list(dict.fromkeys(itertools.chain(*map(programs_of, layouts))))
    first = [EVALUATE]
    if layouts:
        largest = max(layouts, key=lambda layout: layout.slots)
        first = list(dict.fromkeys([*programs_of(layouts[0]), *first, *programs_of(largest)]))
        in_order += measuring_programs(ghosts) if ghosts else ()
    if begins:
        first.insert(0, INIT)
    return first, [program for program in dict.fromkeys(in_order) if program not in first]


def count_flops(lowered: jax.stages.Lowered) -> float | None:
    """The floating-point operations of one device's part of a program; None if JAX has no CPU.

    The count is XLA's cost analysis of the program before it is compiled, which is the same on
    every platform. The analysis of a compiled program omits, on GPUs, everything that became a call
    of cuBLAS or cuDNN (https://github.com/jax-ml/jax/issues/22249). On CPU and TPU the two agree to
    1 % except for very small networks. Unlike the usual counts of multiply-adds, this one leaves
    out a convolution's products with its padding.
    """
    try:
        platform = jax.local_devices(backend="cpu")[0].client
    except RuntimeError:  # JAX_PLATFORMS excludes the CPU
        return None
    module = lowered.compiler_ir("hlo").as_hlo_module()
    return jax_private.analyse_cost(platform, module)["flops"]


def update_flops(programs: Sequence[Compiled], layout: Layout) -> float | None:
    """The floating-point operations of an update on all devices; None where they were not counted.

    Args:
        programs: those of `programs_of(layout)`, compiled.
        layout: of the update. Operations in padding slots are not counted.
    """
    flops = [program.flops for program in programs]
    if None in flops:
        return None
    passes, rest = flops[0], sum(flops[1:])
    return layout.devices * (
        layout.microbatches * passes * (1.0 - layout.idle_share) + rest)
