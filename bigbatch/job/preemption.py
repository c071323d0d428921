"""Stopping in good order: SIGTERM (or Ctrl-C) to any process ends at one position on all.

Programs with a reduction need every process, so all must dispatch the same ones. Each is counted
(`before_reduction`). When one process is told to stop, all freeze and publish their counts; those
behind run on to the largest, and there everyone stops. Counts are frozen by a thread of their own,
so that a process held up in a program that waits for another's is not waited for in turn. Work
without a reduction (a pass of an unfinished update) is abandoned at once.
"""

import signal
import threading
import time
import warnings
from collections.abc import Callable

import jax

from bigbatch.job.jax_private import job_state

LISTEN_SECONDS = 0.1
_STOP, _COUNT = "bigbatch/stop", "bigbatch/reductions"  # folders of the key-value store


class Stop(BaseException):
    """Raised where the processes agreed to stop; not an error, so no `except Exception` eats it."""


class Watch:
    """Listens for SIGTERM and Ctrl-C, here and on the other processes of the job."""

    def __init__(self, agreement_seconds: float = 10.0):
        """`agreement_seconds`: how long to wait for another process's count.

        Warns if signals cannot be heard, which Python gives to the main thread alone.
        """
        self._told = threading.Event()  # here, by a signal
        self._stopping = threading.Event()  # all of the job; this one's count is frozen
        self._lock = threading.Lock()  # over the count and its freezing
        self._reductions = 0
        self._last: int | None = None  # the reduction all stop after, once agreed
        self._wait_milliseconds = int(1000 * agreement_seconds)
        self._client = job_state.client if jax.process_count() > 1 else None
        self._closed = threading.Event()
        if self._client:
            threading.Thread(target=self._listen, name="preemption", daemon=True).start()
        self._handles = threading.current_thread() is threading.main_thread()
        if self._handles:
            signal.set_wakeup_fd(-1)  # whoever followed signals by it (job.join) no longer does
            self._previous = {
                number: signal.signal(number, self._on_signal)
                for number in (signal.SIGTERM, signal.SIGINT)
            }
        else:
            warnings.warn(
                "SIGTERM is not handled: it ends this process without a checkpoint, since training "
                "was not called from the main thread.", stacklevel=3,
            )

    def close(self) -> None:
        """Gives the signals back to whoever had them."""
        self._closed.set()
        if self._handles:
            for number, handler in self._previous.items():
                signal.signal(number, handler)

    def poll(self) -> None:
        """To be called wherever it is safe to stop.

        Raises:
            Stop: if all processes are to stop here.
        """
        if not self._stopping.is_set():
            return
        if self._last is None:
            self._last = self._agree()
        if self._reductions == self._last:
            raise Stop

    def before_reduction(self) -> None:
        """To be called before a program that needs all processes; may raise Stop as `poll`."""
        with self._lock:
            if not self._stopping.is_set():
                self._reductions += 1
                return
        self.poll()
        self._reductions += 1

    def wait(self, done: Callable[[], bool]) -> None:
        """Waits until `done()`, polling."""
        pause = 0.001
        while not done():
            self.poll()
            time.sleep(pause)
            pause = min(2 * pause, 0.05)

    def _on_signal(self, number: int, frame: object) -> None:
        if number == signal.SIGINT:  # a second Ctrl-C does not wait for a save
            signal.signal(number, self._previous[number])
        # No lock here: the main thread, which runs this, may hold it.
        self._told.set()
        if self._client is None:
            self._stopping.set()

    def _listen(self) -> None:
        """Passes a signal on to the other processes and theirs to this one."""
        while not self._closed.wait(LISTEN_SECONDS):
            if self._told.is_set():
                self._client.key_value_set(f"{_STOP}/told", "1", allow_overwrite=True)
            elif not self._client.key_value_dir_get(_STOP):
                continue
            with self._lock:
                mine = str(self._reductions)
                self._client.key_value_set(f"{_COUNT}/{jax.process_index()}", mine)
                self._stopping.set()
            return

    def _agree(self) -> int:
        """The largest count of reductions any process has dispatched."""
        if self._client is None:
            return self._reductions
        return max(
            int(self._client.blocking_key_value_get(f"{_COUNT}/{process}", self._wait_milliseconds))
            for process in range(jax.process_count())
        )
