"""Where the wall-clock time of a run goes, and its speeds."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any


class Clock:
    """Where the time of a run's loop goes, since the last line on speed and in all.

    Speeds are over the time of training alone: without evaluations, checkpoints and waiting for a
    compiler.
    """

    SPENT_ON = ("update", "input", "evaluation", "checkpoint", "compile")  # the rest is "other"

    def __init__(self, peak: float | None, updates: int):
        """Args:
        peak: floating-point operations a second of all devices, at most; None if not known.
        updates: made before this start.
        """
        self.flops: float | None = None  # of an update on all devices, in the phase under way
        self._peak, self._updates = peak, updates
        self._seconds = dict.fromkeys(self.SPENT_ON, 0.0)  # in all
        self._began = self._since = time.perf_counter()
        self._before, self._trained = dict(self._seconds), 0.0  # at the last line on speed
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
        """Seconds of training since the start."""
        apart = sum(self._seconds[what] for what in ("evaluation", "checkpoint", "compile"))
        return time.perf_counter() - self._began - apart

    def dispatched(self, waited: float) -> None:
        """An update is on its way, for which the devices waited so many seconds for input."""
        self._seconds["update"] -= waited
        self._seconds["input"] += waited
        self._dispatched = self.training()

    def idle(self) -> None:
        """The devices have nothing to do until the next update is dispatched."""
        self._idle_since = self.training()

    def first_update(self) -> dict[str, float | None]:
        """Of a phase's first update, once it has ended: how long it took, and what came before.

        `extra_seconds` were between the end of the update before and its dispatch; None at a start.
        """
        idle = self._idle_since
        return {
            "extra_seconds": idle and round(self._dispatched - idle, 4),
            "first_update_seconds": round(self.training() - self._dispatched, 4),
        }

    def speed(self, updates: int, batch_size: int) -> dict[str, Any]:
        """Speeds and shares of time since the last call, for timing.jsonl; starts over.

        Args:
            updates: of the run so far.
            batch_size: of each since the last call.
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
        """Shares of all the time since the start, and how many seconds that is."""
        seconds = time.perf_counter() - self._began
        return {"wall_seconds": round(seconds, 4), "time_share": _shares(self._seconds, seconds)}


def _shares(spent: dict[str, float], seconds: float) -> dict[str, float]:
    shares = {what: round(part / seconds, 4) for what, part in spent.items()}
    return shares | {"other": round(1.0 - sum(spent.values()) / seconds, 4)}
