"""The numbers of metrics.jsonl in TensorBoard's files.

To be imported where they are asked for: tensorboardX imports PyTorch where that is installed, which
takes seconds.
"""

import contextlib
import time
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary


def open_board(workdir: Path, examples_seen: int) -> EventsWriter:
    """A TensorBoard file in `workdir`/tensorboard; steps are examples seen.

    What an earlier start wrote past `examples_seen` is marked as discarded. Not a SummaryWriter,
    which hands each number to a thread through a pipe and waits for the disk at each flush: longer
    than an update of a small network takes.
    """
    folder = workdir / "tensorboard"
    folder.mkdir(parents=True, exist_ok=True)
    board = EventsWriter(str(folder / "events"))
    board.write_event(Event(wall_time=time.time(), step=examples_seen + 1,
                            session_log=SessionLog(status=SessionLog.START)))
    return board


def close_board(board: EventsWriter) -> None:
    """Closes the file. On a full disk it ends early; metrics.jsonl has what it had."""
    with contextlib.suppress(OSError):
        board.close()


def write_board(board: EventsWriter, event: dict[str, Any]) -> None:
    """Puts the numbers of an event on the board; on the disk where there was an evaluation."""
    values = [
        Summary.Value(tag=name, simple_value=value) for name, value in event.items()
        if isinstance(value, int | float) and name != "examples_seen"
    ]
    board.write_event(Event(
        wall_time=time.time(), step=event["examples_seen"], summary=Summary(value=values)))
    if "test_accuracy" in event:
        board.flush()
