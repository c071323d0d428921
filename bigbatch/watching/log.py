"""All that a run writes down and shows: metrics.jsonl, timing.jsonl, TensorBoard, the display.

`metrics.jsonl` holds only what the run determines, one event a line; a run that was killed and
continued leaves the same bytes as one that was not. `timing.jsonl` holds speeds, starts and saves.
"""

from collections.abc import Callable, Mapping
from typing import Any

from bigbatch.storage.continuing import Position
from bigbatch.watching import progress
from bigbatch.watching.clock import Clock

Write = Callable[[str, Mapping[str, Any]], None]  # (metrics or timing, event)


class Log:
    """Writes and shows what happens in a run, where it is the first process's; else does nothing.

    Attributes:
        clock: of the run, whose speeds it writes.
    """

    def __init__(
        self, write: Write, display: progress.Display, clock: Clock, examples: int,
        skipped: Callable[[], int] | None = None,
    ):
        """Args:
        write: adds an event to metrics.jsonl or timing.jsonl.
        display: for a person watching.
        clock: of the run.
        examples: N, of an epoch.
        skipped: how many images were skipped so far, where images are streamed.
        """
        self.clock = clock
        self._write, self._display, self._examples = write, display, examples
        self._skipped = skipped
        self._pace: dict[int, float] = {}  # seconds an update, by batch size

    def line(self, text: str) -> None:
        """Shows a line."""
        self._display.line(text)

    def timing(self, event: str, examples_seen: int, **fields: Any) -> None:
        """Adds an event to timing.jsonl."""
        self._write("timing", {"event": event, "examples_seen": examples_seen, **fields})

    def notice(self, text: str, examples_seen: int) -> None:
        """Shows a line that timing.jsonl keeps too."""
        self.line(text)
        self.timing("notice", examples_seen, text=text)

    def finished(self, event: Mapping[str, Any] | None) -> None:
        """Writes the event of an update that has ended, and the speed since the last; None: none is
        due.
        """
        if event is None:
            return
        if "test_accuracy" in event:
            self.line(
                f"epoch {event['epoch']:.2f}, update {event['updates']}: train loss "
                f"{event['train_loss']:.4f}, test accuracy {event['test_accuracy']:.4f}"
            )
        self._write("metrics", event)
        speed = self.clock.speed(event["updates"], event["batch_size"])
        skipped = {"images_skipped": self._skipped()} if self._skipped else {}
        self.timing("speed", event["examples_seen"], **speed, **skipped)
        if speed["updates"]:
            self._pace[event["batch_size"]] = 1 / speed["updates_per_second"]
        self._display.advance(event["examples_seen"], self._pace)

    def diverged(self, updates: int, examples_seen: int) -> None:
        """Notes after which update training broke down."""
        self._write("timing", {
            "event": "diverged", "updates": updates, "examples_seen": examples_seen,
            "epoch": examples_seen / self._examples})

    def saved(self, at: Position, blocked_seconds: float) -> None:
        """Notes that a checkpoint is being written, and how long the loop waited for that."""
        self.timing("save", at.examples_seen, blocked_seconds=round(blocked_seconds, 4))

    def time_shares(self, at: Position) -> None:
        """Writes and shows where the time of this start went."""
        whole = self.clock.whole()
        self.timing("time_share", at.examples_seen, **whole)
        self.line(progress.describe_shares(whole["time_share"], whole["wall_seconds"]))
