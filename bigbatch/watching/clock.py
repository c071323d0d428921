"""How the wall-clock time of a run is spent, and how fast the run trains."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any


class Clock:
    """Measures how the time of a start is spent, in all and since the last call of `speed`.

    Training time is the time without evaluations, checkpoints and waiting for the compiler. Speeds
    are updates or examples per second of training time.

    Attributes:
        flops: floating-point operations of an update on all devices, in the present phase; None if
            they were not counted.
    """

    SPENT_ON = ("update", "input", "evaluation", "checkpoint", "compile")  # the rest is "other"

    def __init__(self, peak: float | None, updates: int):
        """Args:
        peak: peak floating-point operations per second of all devices; None if unknown.
        updates: made before this start.
        """
        self.flops: float | None = None
        self._peak, self._updates = peak, updates
        self._seconds = dict.fromkeys(self.SPENT_ON, 0.0)  # since the start
        self._began = self._since = time.perf_counter()
        self._before, self._trained = dict(self._seconds), 0.0  # at the last `speed`
        self._idle_since: float | None = None
        self._dispatched = 0.0

    @contextlib.contextmanager
    def spent_on(self, what: str) -> Iterator[None]:
        """Counts the time inside the block as spent on `what`."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[what] += time.perf_counter() - started

    def training(self) -> float:
        """Seconds of training time since the start."""
        apart = sum(self._seconds[what] for what in ("evaluation", "checkpoint", "compile"))
        return time.perf_counter() - self._began - apart

    def dispatched(self, waited: float) -> None:
        """Notes that an update was dispatched in the block of `spent_on("update")` just ended.

        Args:
            waited: seconds of this block in which the devices were idle for want of input. They
                count as spent on "input".
        """
        self._seconds["update"] -= waited
        self._seconds["input"] += waited
        self._dispatched = self.training()

    def idle(self) -> None:
        """Notes that the devices are idle from now until the next update is dispatched."""
        self._idle_since = self.training()

    def first_update(self) -> dict[str, float | None]:
        """The times of a phase's first update, for timing.jsonl; to be called when it has ended.

        Returns:
            `first_update_seconds` from its dispatch to its end, and `extra_seconds` of training
            time from the end of the update before to its dispatch (None in the first phase of a
            start).
        """
        idle = self._idle_since
        return {
            "extra_seconds": idle and round(self._dispatched - idle, 4),
            "first_update_seconds": round(self.training() - self._dispatched, 4),
        }

    def speed(self, updates: int, batch_size: int) -> dict[str, Any]:
        """Speeds and shares of time since the last call, for timing.jsonl.

        Args:
            updates: made by the run so far.
            batch_size: of all updates since the last call.
        """
        now, trained = time.perf_counter(), self.training()
        seconds, training = now - self._since, trained - self._trained
        made = updates - self._updates
        spent = {what: self._seconds[what] - self._before[what] for what in self.SPENT_ON}
        self._since, self._trained, self._updates = now, trained, updates
        self._before = dict(self._seconds)
        utilisation: float | str | None = "unknown chip"
        if self._peak is not None:
            share = self.flops and made * self.flops / training / self._peak
            utilisation = None if share is None else round(share, 4)
        return {
            "updates": made,
            "seconds": round(seconds, 4),
            "updates_per_second": round(made / training, 3),
            "examples_per_second": round(made * batch_size / training, 1),
            "model_flop_utilisation": utilisation,
            "time_share": _shares(spent, seconds),
        }

    def whole(self) -> dict[str, Any]:
        """The seconds since the start and their shares, for timing.jsonl."""
        seconds = time.perf_counter() - self._began
        return {"wall_seconds": round(seconds, 4), "time_share": _shares(self._seconds, seconds)}


def _shares(spent: dict[str, float], seconds: float) -> dict[str, float]:
    shares = {what: round(part / seconds, 4) for what, part in spent.items()}
    return shares | {"other": round(1.0 - sum(spent.values()) / seconds, 4)}
