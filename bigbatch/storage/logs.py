"""The logs of a run, as files of JSON lines with one event a line.

`metrics.jsonl` holds the course of training and no times, so a run that was killed and continued
leaves the same bytes as one that was not. `timing.jsonl` holds starts, speeds, saves and notices.
"""

import json
import os
from pathlib import Path
from typing import Any


def append_event(path: Path, event: dict[str, Any]) -> None:
    """Adds `event` as one line at the end of the file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(event) + "\n")


def read_events(path: Path) -> list[dict[str, Any]]:
    """All events of the file, without a last line that a kill cut short; [] if it is absent."""
    if not path.exists():
        return []
    whole = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in whole]


def cut_events(path: Path, examples_seen: int, pending_evaluation: bool = False) -> None:
    """Removes what a killed run wrote after its checkpoint: later events and an incomplete line.

    The file is replaced in one step, so a kill leaves either the old file or the new one.

    Args:
        path: of metrics.jsonl.
        examples_seen: the position of the checkpoint.
        pending_evaluation: whether there is a pending evaluation at this position, after which the
            event of this position is written; it is then removed too.
    """
    if not path.exists():
        return
    last = examples_seen - pending_evaluation
    kept = [event for event in read_events(path) if event["examples_seen"] <= last]
    text = "".join(json.dumps(event) + "\n" for event in kept)
    if text != path.read_text(encoding="utf-8"):
        replace_text(path, text)


def cut_half_line(path: Path) -> None:
    """Removes a last line that has no line end, which a kill during a write leaves."""
    if path.exists():
        text = path.read_text(encoding="utf-8")
        if text and not text.endswith("\n"):
            replace_text(path, text[: text.rfind("\n") + 1])


def replace_text(path: Path, text: str) -> None:
    """Replaces a file's content by `text` in one step: readers and crashes see the old or the new.

    Raises:
        OSError: if the file cannot be written, for example on a full disk; it names the file.
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
