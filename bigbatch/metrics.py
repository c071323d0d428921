"""What a run writes beside its checkpoints: JSON lines.

`metrics.jsonl` holds only what the run determines, one event a line; a run that was killed and
continued leaves the same bytes as one that was not. `timing.jsonl` holds speeds, starts and saves.
"""

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def append_event(path: Path, event: dict[str, Any]) -> None:
    """Adds one line to a JSON-lines file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(event) + "\n")


def read_events(path: Path) -> list[dict[str, Any]]:
    """The events of a JSON-lines file; a last line that was cut short is left out."""
    if not path.exists():
        return []
    whole = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in whole]


def cut_events(path: Path, examples_seen: int, owed: bool = False) -> None:
    """Removes the events past `examples_seen`, and a half line, that a killed run left.

    With `owed` the event at `examples_seen` itself is still to be written, and goes too. The file
    is replaced at once, so that a kill here leaves the old or the new one.
    """
    if not path.exists():
        return
    last = examples_seen - owed
    kept = [event for event in read_events(path) if event["examples_seen"] <= last]
    text = "".join(json.dumps(event) + "\n" for event in kept)
    if text != path.read_text(encoding="utf-8"):
        replace_text(path, text)


def cut_half_line(path: Path) -> None:
    """Removes a last line without its end, as a kill in the middle of a write leaves it."""
    if path.exists():
        text = path.read_text(encoding="utf-8")
        if text and not text.endswith("\n"):
            replace_text(path, text[: text.rfind("\n") + 1])


def replace_text(path: Path, text: str) -> None:
    """Writes a whole file such that a reader, or a crash, sees the old text or the new.

    Raises:
        OSError: naming the file, if it cannot be written (a full disk).
    """
    beside = path.with_name(path.name + ".new")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


class TimeShares:
    """Where the wall-clock time of a loop goes, since the last question and in all."""

    SPENT_ON = ("update", "input", "evaluation", "checkpoint", "compile")  # the rest is "other"

    def __init__(self):
        self._seconds = dict.fromkeys(self.SPENT_ON, 0.0)  # in all
        self._began = self._since = time.perf_counter()
        self._before, self._trained = dict(self._seconds), 0.0  # at the last question

    @contextlib.contextmanager
    def spent_on(self, what: str) -> Iterator[None]:
        """Counts the time inside the block as spent on `what`."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[what] += time.perf_counter() - started

    def move(self, source: str, target: str, seconds: float) -> None:
        """Counts `seconds` of what was counted as spent on `source` as spent on `target`."""
        self._seconds[source] -= seconds
        self._seconds[target] += seconds

    def training(self) -> float:
        """Seconds since the start, without evaluation, checkpoints and waiting for a compile."""
        apart = sum(self._seconds[what] for what in ("evaluation", "checkpoint", "compile"))
        return time.perf_counter() - self._began - apart

    def speed(
        self, updates: int, batch_size: int, flops: float | None, peak: float | None
    ) -> dict[str, Any]:
        """Speeds and shares since the last call, for timing.jsonl; starts over.

        Speeds are over `training` alone.

        Args:
            updates: made since then.
            batch_size: of each.
            flops: floating-point operations of an update on all devices, if they are known.
            peak: the most of all devices a second, if that is known.
        """
        now, trained = time.perf_counter(), self.training()
        seconds, training = now - self._since, trained - self._trained
        spent = {what: self._seconds[what] - self._before[what] for what in self.SPENT_ON}
        self._since, self._trained, self._before = now, trained, dict(self._seconds)
        utilisation: float | str | None = "unknown chip"
        if peak is not None:
            utilisation = None if flops is None else round(updates * flops / training / peak, 4)
        return {
            "updates": updates,
            "seconds": round(seconds, 4),
            "updates_per_second": round(updates / training, 3),
            "examples_per_second": round(updates * batch_size / training, 1),
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
