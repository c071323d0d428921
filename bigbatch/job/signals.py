"""Signals that tell a run to stop, from its first line on. Plain Python: imported before JAX is."""

import os
import signal
import socket
import threading
from types import FrameType

from bigbatch.job import statuses
from bigbatch.job.output import say

_heard_elsewhere, _left = threading.Event(), threading.Event()


def stop_signals() -> list[signal.Signals]:
    """SIGTERM, Ctrl-C (SIGINT), SLURM's warning before a time limit (SIGUSR1), and a lost terminal
    (SIGHUP), unless `nohup` had that one ignored."""
    numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return numbers if ignored else [*numbers, signal.SIGHUP]


def end_on_signals() -> None:
    """Makes `stop_signals` end the process with status 42 until `preemption.Watch` handles them.

    Before that, also while data are loaded, there is nothing to save. Ctrl-C ends it with 130. A
    thread learns of the signal through a socket, because a Python signal handler does not run while
    a library is loaded, or while JAX waits for other processes.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    numbers = set(stop_signals())
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in a shell's background
        numbers.remove(signal.SIGINT)
    for number in numbers:
        signal.signal(number, _left_to_the_thread)
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)

    def follow() -> None:
        with writer:  # keeps the socket open
            while (number := reader.recv(1)[0]) not in numbers or _heard_elsewhere.is_set():
                pass
        if number == signal.SIGINT:
            say("bigbatch: interrupted.")
            os._exit(statuses.INTERRUPTED)
        say("bigbatch: told to stop before training began.")
        os._exit(statuses.AGAIN)

    threading.Thread(target=follow, name="signals", daemon=True).start()


def _left_to_the_thread(number: int, frame: FrameType | None) -> None:
    """Notes that there was a signal, as `heard_elsewhere` may be called before the thread's turn.

    Ctrl-C is Python's own once the thread no longer minds it.
    """
    if number == signal.SIGINT and _heard_elsewhere.is_set():
        signal.default_int_handler(number, frame)
    _left.set()


def heard_here() -> None:
    """Lets the thread of `end_on_signals`, if there is one, act again: another run begins."""
    _heard_elsewhere.clear()


def heard_elsewhere() -> bool:
    """Ends what `end_on_signals` began: from now on a run saves before it stops.

    To be called once other handlers are there.

    Returns:
        Whether a signal came before that, on which the thread may no longer act.
    """
    _heard_elsewhere.set()
    return _left.is_set()
