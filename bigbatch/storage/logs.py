"""The logs of a run, as files of JSON lines with one event a line.

`metrics.jsonl` holds the course of training and no times, so a run that was killed and continued
leaves the same bytes as one that was not. `timing.jsonl` holds starts, speeds, saves and notices.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bigbatch.mistake import Mistake


def append_event(path: Path, event: Mapping[str, Any]) -> None:
    """Adds `event` as one line at the end of the file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(_line(event))


def read_events(path: Path) -> list[dict[str, Any]]:
    """All events of the file, without a last line that a kill cut short; [] if it is absent.

    Raises:
        Mistake: if a line before it is damaged.
    """
    events, faults = whole_events(path)
    if faults:
        raise Mistake(
            f"{'; '.join(faults)}. Take it out; a run that is continued here does so itself.")
    return events


def cut_events(path: Path, last: int) -> list[str]:
    """Removes what a killed run wrote after its checkpoint: later events and an incomplete line.

    Damaged lines are removed too, as nothing reads them. The file is replaced in one step, so a
    kill leaves either the old file or the new one.

    Args:
        path: of metrics.jsonl.
        last: the examples seen up to which events are kept.

    Returns:
        One text a damaged line.
    """
    if not path.exists():
        return []
    events, faults = whole_events(path, "examples_seen")
    text = "".join(_line(event) for event in events if event["examples_seen"] <= last)
    if text.encode() != path.read_bytes():
        replace_text(path, text)
    return [f"{fault}, and was removed" for fault in faults]


def cut_half_line(path: Path) -> None:
    """Removes a last line that has no line end, which a kill during a write leaves."""
    if path.exists():
        content = path.read_bytes()
        if not content.endswith(b"\n"):
            os.truncate(path, content.rfind(b"\n") + 1)


def whole_events(path: Path, number: str = "") -> tuple[list[dict[str, Any]], list[str]]:
    """The events of the file that are whole, and one text for each damaged line.

    Args:
        path: of the file.
        number: a key that each event has a number for; "" for none.
    """
    if not path.exists():
        return [], []
    events, faults = [], []
    for count, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            event = json.loads(line.decode("ascii"))  # as `_line` writes it
            if not isinstance(event, dict):
                raise ValueError("no event")
            if number and not isinstance(event.get(number), int):
                raise ValueError(f"no {number}")
        except ValueError:
            faults.append(f"line {count} of {path} is damaged ({line[:30]!r}...)")
        else:
            events.append(event)
    return events, faults


def _line(event: Mapping[str, Any]) -> str:
    """The line for an event."""
    return json.dumps(finite(event), allow_nan=False) + "\n"


def finite(value: Any) -> Any:
    """A JSON value with null for what is no finite number, since JSON has no other numbers."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
