"""What a run writes beside its checkpoints: JSON lines.

`metrics.jsonl` holds only what the run determines, one event a line; a run that was killed and
continued leaves the same bytes as one that was not. `timing.jsonl` holds speeds, starts and saves.
"""

import json
import os
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
