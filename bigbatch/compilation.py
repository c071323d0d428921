"""The phases' programs, compiled ahead of need.

A program belongs to its shapes, not to a phase: two phases whose devices take the same number of
ghost batches in a pass share one. All are lowered at the start (tracing holds the interpreter, so
it would slow training down later) and compiled in a background thread, each as soon as it is
lowered. Training waits for what it begins with and for the largest microbatch, so that running out
of memory shows at once; the others follow, in the order in which they are needed, while it goes on.
"""

import atexit
import gc
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import jax
from jax._src.lib import _jax  # the only way to an analysis for another platform than the program's

from bigbatch import program_cache
from bigbatch.seats import Seating

Key = tuple  # ("init",), ("update", seats), ("accumulate", seats), ("apply",), ("evaluate",)


def keys_of(seating: Seating) -> tuple[Key, ...]:
    """The programs an update with this seating runs."""
    if seating.microbatches == 1:
        return (("update", seating.seats),)
    return (("accumulate", seating.seats), ("apply",))


class Compiled(NamedTuple):
    """A program ready to call."""

    call: Any
    seconds: float  # its compilation took
    flops: float | None  # see `count_flops`; None where they were not asked for


def compile_ahead(
    lower: Callable[[Key], jax.stages.Lowered], order: Sequence[Key], counted: bool = False,
    before_each: Callable[[], None] = lambda: None,
) -> dict[Key, Future]:
    """Lowers programs in `order` and compiles them in the background; returns when all are lowered.

    Args:
        lower: gives the program of a key.
        order: the keys.
        counted: whether to count their operations, which takes a part of a second each.
        before_each: called before each is lowered; what it raises passes through.

    Returns:
        A future of `Compiled` by key. What the compiler raises is raised by its `result`.
    """
    futures = {key: Future() for key in order}
    lowered: queue.SimpleQueue[tuple[Key, jax.stages.Lowered] | None] = queue.SimpleQueue()
    ended = threading.Event()

    def compile_all() -> None:
        while (taken := lowered.get()) and not ended.is_set():
            key, program = taken
            started = time.perf_counter()
            try:
                compiled = program.compile()
                program_cache.seal()
                seconds = time.perf_counter() - started
                flops = count_flops(program) if counted else None
            except BaseException as error:
                futures[key].set_exception(error)
            else:
                futures[key].set_result(Compiled(compiled, seconds, flops))

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
        for key in order:
            before_each()
            lowered.put((key, lower(key)))
    finally:
        lowered.put(None)
        if collecting:
            gc.enable()
    return futures


def compile_order(
    seatings: Sequence[Seating], begins: bool = False
) -> tuple[list[Key], list[Key]]:
    """Which programs to compile before the first update, and which later, in order.

    Args:
        seatings: of the phases still to run, in order; none where only an evaluation is.
        begins: whether the run has no state yet.
    """
    in_order = list(dict.fromkeys(key for seating in seatings for key in keys_of(seating)))
    first: list[Key] = [("evaluate",)]
    if seatings:
        largest = max(seatings, key=lambda seating: seating.seats)
        first = list(dict.fromkeys([*keys_of(seatings[0]), *first, *keys_of(largest)]))
    if begins:
        first.insert(0, ("init",))
    return first, [key for key in in_order if key not in first]


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
    return _jax.hlo_module_cost_analysis(platform, module)["flops"]


def update_flops(programs: Sequence[Compiled], seating: Seating) -> float | None:
    """The floating-point operations of an update on all devices; None where they were not counted.

    Args:
        programs: of `keys_of(seating)`.
        seating: of the update. What is worked out for empty seats is no part of it.
    """
    flops = [program.flops for program in programs]
    if None in flops:
        return None
    passes, rest = flops[0], sum(flops[1:])
    return seating.devices * (
        seating.microbatches * passes * (1.0 - seating.idle_share) + rest)
