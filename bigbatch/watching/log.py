"""Logs the events of a run in metrics.jsonl, timing.jsonl, TensorBoard and the display.

`storage.logs` says what the two files hold.
"""

from collections.abc import Callable, Mapping
from typing import Any

from bigbatch.storage.continuing import Position
from bigbatch.watching import progress
from bigbatch.watching.clock import Clock

Write = Callable[[str, Mapping[str, Any]], None]  # (metrics or timing, event)


class Log:
    """Writes and shows the events of a run, through the functions that it is given.

    Attributes:
        clock: measures the speeds that are written.
    """

    def __init__(
        self, write: Write, display: progress.Display, clock: Clock, examples: int,
        skipped: Callable[[], int] | None = None,
    ):
        """Args:
        write: adds an event to metrics.jsonl or timing.jsonl, or does nothing.
        display: shows lines and progress on the terminal.
        clock: see above.
        examples: N, the examples of an epoch.
        skipped: returns how many examples were skipped so far; None if they are not streamed.
        """
        self.clock = clock
        self._write, self._display, self._examples = write, display, examples
        self._skipped = skipped
        self._pace: dict[int, float] = {}  # seconds an update, by batch size

    def line(self, text: str) -> None:
        """Shows a line, which no file keeps."""
        self._display.line(text)

    def position(self, examples_seen: int) -> str:
        """A position as it is shown; see `progress.position`."""
        return self._display.position(examples_seen)

    def timing(self, event: str, examples_seen: int, **fields: Any) -> None:
        """Adds an event to timing.jsonl."""
        self._write("timing", {"event": event, "examples_seen": examples_seen, **fields})

    def notice(self, text: str, examples_seen: int) -> None:
        """Shows a line, and adds it to timing.jsonl."""
        self.line(text)
        self.timing("notice", examples_seen, text=text)

    def finished(self, event: Mapping[str, Any] | None) -> None:
        """Writes the event of an update that has ended, and the speed since the last event.

        Args:
            event: a line of metrics.jsonl; None if none is due, and nothing is written.
        """
        if event is None:
            self.clock.no_line()
            return
        shown = "accuracy" if "test_accuracy" in event else "loss"
        if f"test_{shown}" in event:
            averaged = event.get(f"test_{shown}_average")
            self.line(
                f"{self.position(event['examples_seen'])}, update {event['updates']}: train loss "
                f"{event['train_loss']:.4f}, test {shown} {event[f'test_{shown}']:.4f}"
                + (f" (of the averaged weights {averaged:.4f})" if averaged is not None else "")
            )
        self._write("metrics", event)
        speed = self.clock.speed(event["updates"], event["batch_size"])
        skipped = {"images_skipped": self._skipped()} if self._skipped else {}
        self.timing("speed", event["examples_seen"], **speed, **skipped)
        if speed["updates_per_second"]:
            self._pace[event["batch_size"]] = 1 / speed["updates_per_second"]
        self._display.advance(event["examples_seen"], self._pace)

    def diverged(self, updates: int, examples_seen: int) -> None:
        """Notes in timing.jsonl the last position from which training was still finite."""
        self._write("timing", {
            "event": "diverged", "updates": updates, "examples_seen": examples_seen,
            "epoch": examples_seen / self._examples})

    def saved(self, at: Position, blocked_seconds: float) -> None:
        """Notes in timing.jsonl that a save has started, and for how long it blocked the loop."""
        self.timing("save", at.examples_seen, blocked_seconds=round(blocked_seconds, 4))

    def time_shares(self, at: Position) -> None:
        """Writes and shows how the time of this start was spent."""
        whole = self.clock.whole()
        self.timing("time_share", at.examples_seen, **whole)
        self.line(progress.describe_shares(whole["time_share"], whole["wall_seconds"]))
