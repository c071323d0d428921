"""The phases' programs, compiled ahead of need.

A program belongs to its shapes, not to a phase: two phases whose devices take the same number of
ghost batches in a pass share one. All are lowered at the start (tracing holds the interpreter, so
it would slow training down later), then compiled in a background thread. Training waits for what
it begins with and for the largest microbatch, so that running out of memory shows at once; the
others follow, in the order in which they are needed, while it goes on.
"""

import atexit
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import jax

from bigbatch import program_cache
from bigbatch.seats import Seating

Key = tuple  # ("update", seats), ("accumulate", seats), ("apply",), ("evaluate",)


def keys_of(seating: Seating) -> tuple[Key, ...]:
    """The programs an update with this seating runs."""
    if seating.microbatches == 1:
        return (("update", seating.seats),)
    return (("accumulate", seating.seats), ("apply",))


class Compiled(NamedTuple):
    """A program ready to call."""

    call: Any
    seconds: float  # its compilation took


def compile_ahead(
    lowered: Mapping[Key, jax.stages.Lowered], order: Sequence[Key]
) -> dict[Key, Future]:
    """Starts compiling in the background, in `order`; returns a future of `Compiled` by key.

    What the compiler raises is raised by the future's `result`.
    """
    futures = {key: Future() for key in order}
    ended = threading.Event()

    def compile_all() -> None:
        for key in order:
            if ended.is_set():
                return
            started = time.perf_counter()
            try:
                program = lowered[key].compile()
                program_cache.seal()
            except BaseException as error:
                futures[key].set_exception(error)
            else:
                futures[key].set_result(Compiled(program, time.perf_counter() - started))

    # A daemon: a run that stops does not wait for programs it no longer needs. Where Python itself
    # ends (a script, a notebook) it has to, as a thread stopped inside the compiler aborts it.
    thread = threading.Thread(target=compile_all, name="compile", daemon=True)
    thread.start()
    atexit.register(lambda: (ended.set(), thread.join()))
    return futures


def compile_order(seatings: Sequence[Seating]) -> tuple[list[Key], list[Key]]:
    """Which programs to compile before the first update, and which later, in order.

    Args:
        seatings: of the phases still to run, in order; none where only an evaluation is.
    """
    in_order = list(dict.fromkeys(key for seating in seatings for key in keys_of(seating)))
    first: list[Key] = [("evaluate",)]
    if seatings:
        largest = max(seatings, key=lambda seating: seating.seats)
        first = list(dict.fromkeys([*keys_of(seatings[0]), *first, *keys_of(largest)]))
    return first, [key for key in in_order if key not in first]
