"""How the wall-clock time of a run is spent, and how fast the run trains."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any, NamedTuple


class _Look(NamedTuple):
    """What the clock showed at a moment."""

    now: float
    seconds: dict[str, float]  # spent since the start, by what

    @property
    def untrained(self) -> float:
        """Seconds since the start that were no training time."""
        return sum(self.seconds[what] for what in ("evaluation", "checkpoint", "compile"))


class Clock:
    """Measures how the time of a start is spent, in all and since the last call of `speed`.

    Training time is the time without evaluations, checkpoints and waiting for the compiler. Speeds
    are updates or examples per second of training time, between two moments at which the updates
    were known to have ended: to dispatch the passes of an update takes as long as all but its last
    ones, so what is known of the update before it is not to wait for that.

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
        self._began = time.perf_counter()
        self._last = _Look(self._began, dict(self._seconds))  # the end of the last `speed`
        self._landed: _Look | None = None  # where the newest update that ended did; None: now
        self._under_way: tuple[str, float] | None = None  # what time is spent on now, since when
        self._idle_since: float | None = None
        self._dispatched = 0.0

    @contextlib.contextmanager
    def spent_on(self, what: str) -> Iterator[None]:
        """Counts the time inside the block as spent on `what`."""
        started = time.perf_counter()
        self._under_way = what, started
        try:
            yield
        finally:
            self._seconds[what] += time.perf_counter() - started
            self._under_way = None

    def _look(self) -> _Look:
        look = _Look(time.perf_counter(), dict(self._seconds))
        if self._under_way:
            what, started = self._under_way
            look.seconds[what] += look.now - started
        return look

    def training(self) -> float:
        """Seconds of training time since the start."""
        look = self._look()
        return look.now - self._began - look.untrained

    def update_started(self) -> None:
        """Notes that the first program of an update is dispatched now."""
        self._dispatched = self.training()

    def update_landed(self, waited: float) -> None:
        """Notes that the update before the one that is being dispatched has ended by now.

        Args:
            waited: see `dispatched`, up to now.
        """
        self._landed = self._look()
        self._landed.seconds["update"] -= waited
        self._landed.seconds["input"] += waited

    def no_line(self) -> None:
        """Notes that nothing is written about the update that ended last."""
        self._landed = None

    def dispatched(self, waited: float) -> None:
        """Notes that an update was dispatched in the block of `spent_on("update")` just ended.

        Args:
            waited: seconds of this block in which the devices were idle for want of input. They
                count as spent on "input".
        """
        self._seconds["update"] -= waited
        self._seconds["input"] += waited

    def idle(self) -> None:
        """Notes that the devices are idle from now until the next update is dispatched."""
        self._idle_since, self._landed = self.training(), None

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
        """Speeds and shares of time from the last call's update to this one's, for timing.jsonl.

        Args:
            updates: made by the run so far.
            batch_size: of all updates since the last call.
        """
        look, last = self._landed or self._look(), self._last
        seconds = max(look.now - last.now, 1e-6)
        training = max(look.now - last.now - (look.untrained - last.untrained), 1e-6)
        made = updates - self._updates
        spent = {what: look.seconds[what] - last.seconds[what] for what in self.SPENT_ON}
        self._last, self._landed, self._updates = look, None, updates
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
