"""Logs the events of a run in metrics.jsonl, timing.jsonl, TensorBoard and the display.

`storage.logs` says what the two files hold.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bigbatch.schedule import Phase
from bigbatch.schedule.smoothing import Parts, Smoothed
from bigbatch.storage.continuing import Position
from bigbatch.watching import progress
from bigbatch.watching.clock import Clock

# A batch is warned of from this multiple of the measured noise scale, which itself is known to a
# factor of 2 or so; and of an average that weighs as much as that of 0.7 of its window.
NOISE_FACTOR, TRUSTED = 2, 0.5

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
        skipped: returns how many examples this process has skipped since this start, those of the
            test set in each evaluation anew; None if they are not streamed.
        """
        self.clock = clock
        self._write, self._display, self._examples = write, display, examples
        self._skipped = skipped
        self._pace: dict[int, float] = {}  # seconds an update, by batch size
        self._by_groups, self._groups = Smoothed(), None
        self._warned: set[str] = set()  # phases whose batch is known to be beyond the noise

    def line(self, text: str) -> None:
        """Shows a line, which no file keeps."""
        self._display.line(text)

    def position(self, examples_seen: int) -> str:
        """A position as it is shown; see `progress.position`."""
        return self._display.position(examples_seen)

    def follow(self, phases: Sequence[Phase]) -> None:
        """Counts the time to go over other phases from now on."""
        self._display.follow(phases)

    def timing(self, event: str, examples_seen: int, **fields: Any) -> None:
        """Adds an event to timing.jsonl."""
        self._write("timing", {"event": event, "examples_seen": examples_seen, **fields})

    def notice(self, text: str, examples_seen: int) -> None:
        """Shows a line, and adds it to timing.jsonl."""
        self.line(text)
        self.timing("notice", examples_seen, text=text)

    def saw_groups(
        self, parts: Parts | None, groups: Any, examples: int, window: int
    ) -> None:
        """Takes note of the noise scale as devices and passes show it, for timing.jsonl.

        Args:
            parts: of an update; None where there is one device and one pass.
            groups: how many devices and passes took part.
            examples: of the update.
            window: see `Smoothed.after`.
        """
        self._by_groups = self._by_groups.after(parts, examples, window)
        self._groups = None if parts is None else int(groups)

    def warn_of_noise(self, event: Mapping[str, Any], weight: float) -> None:
        """Warns, once a phase, of a batch that is far beyond the measured noise scale.

        Args:
            event: a line of metrics.jsonl.
            weight: of what its noise scale is the average of; see `Smoothed`.
        """
        measured, phase, batch = event.get("noise_measured"), event["phase"], event["batch_size"]
        if measured is None or weight < TRUSTED or phase in self._warned:
            return
        if batch > NOISE_FACTOR * measured:
            self._warned.add(phase)
            self.notice(
                f"the batch of {batch} is over {NOISE_FACTOR} times the measured noise scale, "
                f"{measured:.3g} examples: an update of so many hardly learns more than one of "
                "fewer, so batches and rates can no longer be exchanged as the schedule does "
                "(docs/noise.md)", event["examples_seen"])

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
                + _noise(event)
            )
        self._write("metrics", event)
        speed = self.clock.speed(event["updates"], event["batch_size"])
        skipped = {"images_skipped": self._skipped()} if self._skipped else {}
        self.timing("speed", event["examples_seen"], **speed, **skipped)
        if self._groups is not None:
            self.timing("noise", event["examples_seen"], noise_measured=self._by_groups.scale,
                        **self._by_groups._asdict(), groups=self._groups)
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


def _noise(event: Mapping[str, Any]) -> str:
    """The noise as it is predicted, and the batch beside what is measured, for a line.

    "" where nothing is measured.
    """
    measured = event.get("noise_full") or event.get("noise_measured")
    return "" if measured is None else (
        f"; noise g = {event['noise_scale']:.3g}, batch {event['batch_size']} beside a measured "
        f"scale of {measured:.3g} examples")
