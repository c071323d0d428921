"""What a run writes beside its checkpoints: JSON lines and TensorBoard files.

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

from tensorboardX import SummaryWriter


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


def open_tensorboard(workdir: Path, examples_seen: int) -> SummaryWriter:
    """TensorBoard files in `workdir`/tensorboard; steps are examples seen.

    What an earlier start wrote past `examples_seen` is marked as discarded.
    """
    return SummaryWriter(str(workdir / "tensorboard"), purge_step=examples_seen + 1)


def close_board(board: SummaryWriter) -> None:
    """Closes the files. On a full disk they end early; metrics.jsonl has what they had."""
    with contextlib.suppress(OSError):
        board.close()


def write_board(board: SummaryWriter, event: dict[str, Any]) -> None:
    """Puts the numbers of an event on the board."""
    for name, value in event.items():
        if isinstance(value, int | float) and name != "examples_seen":
            board.add_scalar(name, value, event["examples_seen"])
    board.flush()


class TimeShares:
    """Where the wall-clock time of a loop goes."""

    def __init__(self):
        self._seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    @contextlib.contextmanager
    def spent_on(self, what: str) -> Iterator[None]:
        """Counts the time inside the block as spent on `what`."""
        started = time.perf_counter()
        try:
            yield
        finally:
            passed = time.perf_counter() - started
            self._seconds[what] = self._seconds.get(what, 0.0) + passed

    def move(self, source: str, target: str, seconds: float) -> None:
        """Counts `seconds` of what was counted as spent on `source` as spent on `target`."""
        self._seconds[source] = self._seconds.get(source, 0.0) - seconds
        self._seconds[target] = self._seconds.get(target, 0.0) + seconds

    def speed(self, updates: int, batch_size: int) -> dict[str, Any]:
        """Speeds and shares since the last call, for timing.jsonl; starts over.

        Evaluation, checkpoints and waiting for a compile are not counted into the speeds.
        """
        now = time.perf_counter()
        seconds = now - self._since
        shares = {what: spent / seconds for what, spent in self._seconds.items()}
        shares["other"] = 1.0 - sum(shares.values())
        training = seconds * (shares["other"] + sum(
            shares[what] for what in ("update", "input") if what in shares))
        self._seconds, self._since = {}, now
        return {
            "updates": updates,
            "seconds": round(seconds, 4),
            "updates_per_second": round(updates / training, 3),
            "examples_per_second": round(updates * batch_size / training, 1),
            "time_share": {what: round(share, 4) for what, share in shares.items()},
        }
