"""The event files for TensorBoard: in order whatever the clock does, and without PyTorch."""

import os
import struct
import subprocess
import sys
import time

import pytest

from bigbatch.watching import tensorboard
from tests.conftest import REPOSITORY

EVENT = {"examples_seen": 100, "updates": 1, "train_loss": 0.5, "phase": "noise/1"}


def read(path):
    """The events of a file."""
    content, events = path.read_bytes(), []
    while content:
        length, = struct.unpack_from("<Q", content)
        events.append(tensorboard.Event.FromString(content[12:12 + length]))
        content = content[16 + length:]
    return events


def one_start(workdir, seen):
    board = tensorboard.open_board(workdir, seen)
    for step in (seen + 100, seen + 200):
        tensorboard.write_board(board, EVENT | {"examples_seen": step, "test_accuracy": 0.5})
    tensorboard.close_board(board)


def test_files_and_times_rise_where_the_clock_is_set_back(tmp_path, monkeypatch):
    for seen, clock in ((0, 2e9), (200, 1.9e9), (400, 1.9e9), (600, 2.1e9 + 1)):
        monkeypatch.setattr(time, "time", lambda clock=clock: clock)
        one_start(tmp_path, seen)
    files = sorted((tmp_path / "tensorboard").iterdir())  # as TensorBoard reads them
    events = [event for file in files for event in read(file)]
    steps = [event.step for event in events if event.HasField("summary")]
    assert steps == [100, 200, 300, 400, 500, 600, 700, 800]
    starts = [event.step for event in events if event.HasField("session_log")]
    assert starts == [1, 201, 401, 601]
    times = [event.wall_time for event in events]
    assert times == sorted(times) and times[-1] > 2.1e9 > times[-5]
    assert [read(file)[0].file_version for file in files] == ["brain.Event:2"] * 4


def test_files_that_stayed_in_a_bucket_come_first_too(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1.9e9)
    tensorboard.close_board(tensorboard.open_board(
        tmp_path, 0, ["events.out.tfevents.2000000000.host", "events.out.tfevents.1950000000.a"]))
    file, = (tmp_path / "tensorboard").iterdir()
    assert file.name.startswith("events.out.tfevents.2000000001.")
    assert {event.wall_time for event in read(file)} == {2e9}


def test_a_file_that_was_cut_short_gives_its_whole_events_times(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 2e9)
    one_start(tmp_path, 0)
    file, = (tmp_path / "tensorboard").iterdir()
    content = file.read_bytes()
    for length in (0, 5, 30, len(content) - 1, len(content)):
        file.write_bytes(content[:length])
        assert tensorboard._last_time(file) == (2e9 if length > 20 else 0)


def test_the_values_are_those_of_the_line(tmp_path):
    one_start(tmp_path, 0)
    file, = (tmp_path / "tensorboard").iterdir()
    values = {value.tag: value.simple_value for value in read(file)[2].summary.value}
    assert values == {"updates": 1, "train_loss": 0.5, "test_accuracy": 0.5}


def test_a_class_put_in_the_place_of_tensorboards_learns_of_the_folder(tmp_path, monkeypatch):
    """As `wandb.init(sync_tensorboard=True)` puts one there, and reads what is in the folder."""
    told = []

    class Patched(tensorboard.writer.EventFileWriter):
        def __init__(self, logdir, *args, **kwargs):
            told.append(logdir)
            super().__init__(logdir, *args, **kwargs)

    monkeypatch.setattr(tensorboard.writer, "EventFileWriter", Patched)
    one_start(tmp_path, 0)
    assert told == [str(tmp_path / "tensorboard")]
    *_, last = sorted((tmp_path / "tensorboard").iterdir())
    assert [event.step for event in read(last)][-2:] == [100, 200]


@pytest.mark.parametrize("before", ["", "import torch; "])
def test_pytorch_is_not_imported_and_can_be_later(tmp_path, before):
    (tmp_path / "torch.py").write_text("print('torch is imported')\nclass Tensor: pass\n")
    done = subprocess.run(
        [sys.executable, "-c", f"{before}import bigbatch.watching.tensorboard; print('written'); "
         "import torch; torch.Tensor"], cwd=REPOSITORY, text=True, capture_output=True, check=False,
        env=os.environ | {"PYTHONPATH": str(tmp_path)})
    expected = ["written", "torch is imported"]
    assert done.stdout.split("\n")[:2] == (expected[::-1] if before else expected), done.stderr
