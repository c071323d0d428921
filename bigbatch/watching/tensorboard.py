"""Writes the numbers of metrics.jsonl to TensorBoard's event files.

To be imported only by runs that write them.
"""

import contextlib
import re
import socket
import struct
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def _without_torch() -> Iterator[None]:
    """Makes `import torch` fail in the block, unless PyTorch is imported already.

    tensorboardX imports it where it is installed, which takes seconds, for what is not used here.
    """
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None
    try:
        yield
    finally:
        del sys.modules["torch"]


with _without_torch():
    from tensorboardX import RecordWriter, event_file_writer, writer
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.proto.summary_pb2 import Summary


class Board:
    """An event file. Its times never go back, and are later than those of the files before it."""

    def __init__(self, path: Path, time_before: float):
        self._file, self._time = RecordWriter(str(path)), time_before
        self.write(file_version="brain.Event:2")

    def write(self, **content: Any) -> None:
        self._time = max(self._time, time.time())
        self._file.write(Event(wall_time=self._time, **content).SerializeToString())

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.flush()
        self._file.close()


def open_board(workdir: Path, last: int, elsewhere: Iterable[str] = ()) -> Board:
    """Opens a new event file in `workdir`/tensorboard, whose steps are examples seen.

    TensorBoard is made to discard what an earlier start wrote after `last`. It reads the files in
    the order of the times in their names, so these rise even where the clock was set back: it would
    else discard what the newest file has. A SummaryWriter is not used: it passes each number to a
    thread through a pipe and waits for the disk at each flush, which takes longer than an update of
    a small network.

    Args:
        workdir: the local folder of the run.
        last: the examples seen up to which an earlier start's numbers are kept.
        elsewhere: names of earlier starts' files that are not in the folder.
    """
    folder = workdir / "tensorboard"
    folder.mkdir(parents=True, exist_ok=True)
    if writer.EventFileWriter is not event_file_writer.EventFileWriter:
        # What `wandb.init(sync_tensorboard=True)` puts there learns of a folder in this way, and
        # then reads all files in it.
        writer.EventFileWriter(str(folder)).close()
    present = {path.name: path for path in folder.iterdir()}
    named = max((int(match[1]) for name in (*present, *elsewhere)
                 if (match := re.search(r"\.tfevents\.(\d+)\.", name))), default=0)
    name = f"events.out.tfevents.{max(int(time.time()), named + 1):010}.{socket.gethostname()}"
    board = Board(folder / name, max([float(named), *map(_last_time, present.values())]))
    board.write(step=last + 1, session_log=SessionLog(status=SessionLog.START))
    return board


def _last_time(path: Path) -> float:
    """The latest wall time of an event file's events, without a last one that a kill cut short."""
    latest = 0.0
    with contextlib.suppress(OSError, struct.error), path.open("rb") as file:
        while header := file.read(12):  # the length of an event, and a checksum
            event = file.read(struct.unpack("<Qxxxx", header)[0])
            file.seek(4, 1)  # its checksum
            if event[:1] == b"\x09":  # its first field, the wall time
                latest = max(latest, struct.unpack_from("<d", event, 1)[0])
    return latest


def close_board(board: Board) -> None:
    """Closes the file. On a full disk its end is lost, but metrics.jsonl has the same numbers."""
    with contextlib.suppress(OSError):
        board.close()


def write_board(board: Board, event: dict[str, Any]) -> None:
    """Adds the numbers of an event, and flushes the file to disk after an evaluation."""
    values = [
        Summary.Value(tag=name, simple_value=value) for name, value in event.items()
        if isinstance(value, int | float) and name != "examples_seen"
    ]
    board.write(step=event["examples_seen"], summary=Summary(value=values))
    if "test_loss" in event:
        board.flush()
