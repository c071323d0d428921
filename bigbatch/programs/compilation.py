"""The phases' programs, compiled ahead of need.

A program belongs to its shapes, not to a phase: two phases whose devices take the same number of
ghost batches in a pass share one. All are lowered at the start (tracing holds the interpreter, so
it would slow training down later) and compiled in a background thread, each as soon as it is
lowered. Training waits for what it begins with and for the largest microbatch, so that running out
of memory shows at once; the others follow, in the order in which they are needed, while it goes on.
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
from bigbatch.programs import program_cache
from bigbatch.schedule.layout import Layout


class Kind(enum.Enum):
    """What a program does."""

    INIT = "init"  # draws the state of a new run
    UPDATE = "update"  # a whole update, in one pass
    ACCUMULATE = "accumulate"  # one pass of several
    APPLY = "apply"  # the reduction and the optimizer, after the passes
    EVALUATE = "evaluate"  # one batch of the test set


class Program(NamedTuple):
    """A program of a run."""

    kind: Kind
    slots: int = 0  # ghost batches a device takes in it; of UPDATE and ACCUMULATE

    def __str__(self) -> str:
        return f"{self.kind.value} {self.slots}" if self.slots else self.kind.value


INIT, APPLY, EVALUATE = Program(Kind.INIT), Program(Kind.APPLY), Program(Kind.EVALUATE)


def programs_of(layout: Layout) -> tuple[Program, ...]:
    """The programs an update with this layout runs."""
    if layout.microbatches == 1:
        return (Program(Kind.UPDATE, layout.slots),)
    return (Program(Kind.ACCUMULATE, layout.slots), APPLY)


class Compiled(NamedTuple):
    """A program ready to call."""

    call: Any
    seconds: float  # its compilation took
    flops: float | None  # see `count_flops`; None where they were not asked for


def compile_ahead(
    lower: Callable[[Program], jax.stages.Lowered], order: Sequence[Program], counted: bool = False,
    before_each: Callable[[], None] = lambda: None,
) -> dict[Program, Future]:
    """Lowers programs in `order` and compiles them in the background; returns when all are lowered.

    Args:
        lower: lowers a program.
        order: the programs.
        counted: whether to count their operations, which takes a part of a second each.
        before_each: called before each is lowered; what it raises passes through.

    Returns:
        A future of `Compiled` by program. What the compiler raises is raised by its `result`.
    """
    futures = {program: Future() for program in order}
    lowered: queue.SimpleQueue[tuple[Program, jax.stages.Lowered] | None] = queue.SimpleQueue()
    ended = threading.Event()

    def compile_all() -> None:
        while (taken := lowered.get()) and not ended.is_set():
            program, low = taken
            started = time.perf_counter()
            try:
                compiled = low.compile()
                program_cache.seal()
                seconds = time.perf_counter() - started
                flops = count_flops(low) if counted else None
            except BaseException as error:
                futures[program].set_exception(error)
            else:
                futures[program].set_result(Compiled(compiled, seconds, flops))

    # A daemon: a run that stops does not wait for programs it no longer needs. Where Python itself
    # ends (a script, a notebook) it has to, as a thread stopped inside the compiler aborts it.
    thread = threading.Thread(target=compile_all, name="compile", daemon=True)
    thread.start()

    def end() -> None:
        ended.set()
        lowered.put(None)
        thread.join()

    atexit.register(end)
    collecting = gc.isenabled()
    gc.disable()  # what tracing makes stays too long: to look through it takes a sixth of the time
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
    layouts: Sequence[Layout], begins: bool = False
) -> tuple[list[Program], list[Program]]:
    """Which programs to compile before the first update, and which later, in order.

    Args:
        layouts: of the phases still to run, in order; none where only an evaluation is.
        begins: whether the run has no state yet.
    """
    in_order = list(dict.fromkeys(itertools.chain(*map(programs_of, layouts))))
    first = [EVALUATE]
    if layouts:
        largest = max(layouts, key=lambda layout: layout.slots)
        first = list(dict.fromkeys([*programs_of(layouts[0]), *first, *programs_of(largest)]))
    if begins:
        first.insert(0, INIT)
    return first, [program for program in in_order if program not in first]


def count_flops(lowered: jax.stages.Lowered) -> float | None:
    """The floating-point operations of one device's part of a program; None if not to be had.

    By XLA's cost analysis of the program as it is before any compiler works on it, which is the
    same on every platform. That of the compiled program leaves out, on GPUs, all that became a call
    of cuBLAS or cuDNN (https://github.com/jax-ml/jax/issues/22249); on CPU and TPU the two agree to
    1 % for networks of some size. A convolution's products with its padding are not counted, as
    they are in the usual figures of multiply-adds.
    """
    try:
        platform = jax.local_devices(backend="cpu")[0].client
    except RuntimeError:  # JAX_PLATFORMS leaves the CPU out
        return None
    module = lowered.compiler_ir("hlo").as_hlo_module()
    return jax_private.analyse_cost(platform, module)["flops"]


def update_flops(programs: Sequence[Compiled], layout: Layout) -> float | None:
    """The floating-point operations of an update on all devices; None where they were not counted.

    Args:
        programs: of `programs_of(layout)`.
        layout: of the update. What is computed for padding slots is not counted.
    """
    flops = [program.flops for program in programs]
    if None in flops:
        return None
    passes, rest = flops[0], sum(flops[1:])
    return layout.devices * (
        layout.microbatches * passes * (1.0 - layout.idle_share) + rest)
