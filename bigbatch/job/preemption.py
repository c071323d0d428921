"""Stopping on one of `signals.stop_signals` to any process of a job, at one position for all.

A program with a reduction needs every process, so all processes must dispatch the same ones. Each
process counts the reductions that it dispatches (`before_reduction`). After a signal every process
freezes its count and publishes it. Those behind continue to the largest count, and there all stop.
A separate thread freezes the count, so a process whose main thread waits inside a reduction for
another process still publishes its count. Work without a reduction (a pass of an unfinished update)
is abandoned at once.
"""

import signal
import threading
import time
import warnings
from collections.abc import Callable

import jax

from bigbatch.job import signals
from bigbatch.job.jax_private import job_state

LISTEN_SECONDS = 0.1
_STOP, _COUNT = "bigbatch/stop", "bigbatch/reductions"  # directories of the key-value store


class Stop(BaseException):
    """Raised where all processes stop. No Exception, so that no `except Exception` catches it."""


class Watch:
    """Listens for `signals.stop_signals`, to this process and to the others of the job."""

    def __init__(self, agreement_seconds: float = 10.0):
        """Installs the signal handlers. Warns outside the main thread, where Python allows none.

        Args:
            agreement_seconds: how long to wait for the count of another process.
        """
        self._signalled = threading.Event()  # this process has received a signal
        self._stopping = threading.Event()  # the job is to stop; this process's count is frozen
        self._lock = threading.Lock()  # guards the count until it is frozen
        self._reductions = 0
        self._last: int | None = None  # the count at which all processes stop, once agreed
        self._wait_milliseconds = int(1000 * agreement_seconds)
        self._client = job_state.client if jax.process_count() > 1 else None
        self._closed = threading.Event()
        if self._client:
            threading.Thread(target=self._listen, name="preemption", daemon=True).start()
        self._handles = threading.current_thread() is threading.main_thread()
        if self._handles:
            self._previous = {
                number: signal.signal(number, self._on_signal)
                for number in signals.stop_signals()
            }
            self._wakeup = signal.set_wakeup_fd(-1)  # a notebook has one of its own
            if signals.heard_elsewhere():
                self._stop()
        else:
            warnings.warn(
                "SIGTERM is not handled: it ends this process without a checkpoint, since training "
                "was not called from the main thread.", stacklevel=4,
            )

    def close(self) -> None:
        """Restores the previous signal handlers, and the file that is told of signals."""
        self._closed.set()
        if self._handles:
            for number, handler in self._previous.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._wakeup)

    def poll(self) -> None:
        """To be called wherever stopping is safe.

        Raises:
            Stop: if all processes are to stop here.
            jax.errors.JaxRuntimeError: if another process has not published its count in time.
        """
        if not self._stopping.is_set():
            return
        if self._last is None:
            self._last = self._agree()
        if self._reductions == self._last:
            raise Stop

    def before_reduction(self) -> None:
        """To be called before each program with a reduction; raises what `poll` raises."""
        with self._lock:
            if not self._stopping.is_set():
                self._reductions += 1
                return
        self.poll()
        self._reductions += 1

    def wait(self, done: Callable[[], bool]) -> None:
        """Polls until `done()` is true; raises what `poll` raises."""
        pause = 0.001
        while not done():
            self.poll()
            time.sleep(pause)
            pause = min(2 * pause, 0.05)

    def _on_signal(self, number: int, frame: object) -> None:
        if number == signal.SIGINT:  # a second Ctrl-C ends the process at once
            signal.signal(number, self._previous[number])
        self._stop()

    def _stop(self) -> None:
        # The main thread runs this and may hold the lock already, so it must not be taken.
        self._signalled.set()
        if self._client is None:
            self._stopping.set()

    def _listen(self) -> None:
        """Announces a signal to the other processes, waits for theirs, and freezes the count."""
        while not self._closed.wait(LISTEN_SECONDS):
            if self._signalled.is_set():
                self._client.key_value_set(f"{_STOP}/told", "1", allow_overwrite=True)
            elif not self._client.key_value_dir_get(_STOP):
                continue
            with self._lock:
                mine = str(self._reductions)
                self._client.key_value_set(f"{_COUNT}/{jax.process_index()}", mine)
                self._stopping.set()
            return

    def _agree(self) -> int:
        """The largest of the counts that the processes have published."""
        if self._client is None:
            return self._reductions
        return max(
            int(self._client.blocking_key_value_get(f"{_COUNT}/{process}", self._wait_milliseconds))
            for process in range(jax.process_count())
        )
