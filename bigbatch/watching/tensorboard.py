"""Writes the numbers of metrics.jsonl to TensorBoard's event files.

To be imported only by runs that write them, as tensorboardX imports PyTorch if that is installed,
which takes seconds.
"""

import contextlib
import time
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary


def open_board(workdir: Path, examples_seen: int) -> EventsWriter:
    """Opens a new event file in `workdir`/tensorboard, whose steps are examples seen.

    TensorBoard is made to discard what an earlier start wrote after `examples_seen`. A
    SummaryWriter is not used: it passes each number to a thread through a pipe and waits for the
    disk at each flush, which takes longer than an update of a small network.
    """
    folder = workdir / "tensorboard"
    folder.mkdir(parents=True, exist_ok=True)
    board = EventsWriter(str(folder / "events"))
    board.write_event(Event(wall_time=time.time(), step=examples_seen + 1,
                            session_log=SessionLog(status=SessionLog.START)))
    return board


def close_board(board: EventsWriter) -> None:
    """Closes the file. On a full disk its end is lost, but metrics.jsonl has the same numbers."""
    with contextlib.suppress(OSError):
        board.close()


def write_board(board: EventsWriter, event: dict[str, Any]) -> None:
    """Adds the numbers of an event, and flushes the file to disk after an evaluation."""
    values = [
        Summary.Value(tag=name, simple_value=value) for name, value in event.items()
        if isinstance(value, int | float) and name != "examples_seen"
    ]
    board.write_event(Event(
        wall_time=time.time(), step=event["examples_seen"], summary=Summary(value=values)))
    if "test_accuracy" in event:
        board.flush()
