"""The worker processes of a stream: how long they live, and what they leave behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bigbatch.data.streaming import SHARED_MEMORY

SCRIPT = """
import os, sys, time
import jax
from tests.data.test_streaming import Records, dealt, make_data, open_stream

class Telling(Records):
    def __getitem__(self, record):
        from jax._src import xla_bridge
        assert not xla_bridge.backends_are_initialized()
        return super().__getitem__(record) | {"label": os.getpid()}

if __name__ == "__main__":
    jax.devices()
    data = make_data(workers=2, image_size=100, eval_share=1.0, num_classes=2**22)
    stream = open_stream(Telling(), data, dealt(0, 10**6, 40))
    workers = {int(pid) for _ in range(3) for pid in next(stream).arrays_S["labels"]}
    print("workers", *workers, flush=True)
    if sys.argv[1] == "leave":
        raise SystemExit(f"{next(stream).usable_S.shape}")
    if sys.argv[1] == "close":
        stream.close()
        os._exit(1)
    while True:
        next(stream)
        print("going on", flush=True)
        time.sleep(0.05)
"""


def running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def shared_memory() -> set[str]:
    """The names of the blocks of shared memory that processes of Python have made."""
    return {path.name for path in SHARED_MEMORY.glob("psm_*")}


def wait_until(done, what: str) -> None:
    until = time.monotonic() + 30
    while not done():
        assert time.monotonic() < until, what
        time.sleep(0.1)


@pytest.fixture
def start(tmp_path):
    """Runs SCRIPT in a process of its own; returns it and its workers' numbers."""
    processes = []

    def begin(what: str) -> tuple[subprocess.Popen, list[int]]:
        script = tmp_path / "script.py"
        script.write_text(SCRIPT)
        root = str(Path(__file__).parents[2])
        process = subprocess.Popen(
            [sys.executable, str(script), what], text=True, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, cwd=root,
            env={**os.environ, "PYTHONPATH": root, "JAX_PLATFORMS": "cpu"},
        )
        processes.append(process)
        line = process.stdout.readline()
        assert line.startswith("workers"), process.communicate(timeout=20)[1]
        return process, [int(pid) for pid in line.split()[1:]]

    yield begin
    for process in processes:
        process.kill()
        process.communicate()


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks into /proc")


def assert_nothing_is_left(workers: list[int], before: set[str]) -> None:
    wait_until(lambda: not any(map(running, workers)), "a worker is left")
    # Other tests' blocks come and go meanwhile: what stays is what was left.
    left = shared_memory() - before
    wait_until(lambda: not left & shared_memory(), f"{left} is left in {SHARED_MEMORY}")


@needs_proc
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_workers_outlive_signals_to_a_job_but_not_the_process_that_trains(start, number):
    before = shared_memory()
    process, workers = start("go on")
    assert len(workers) == 2 and process.pid not in workers
    for pid in workers:
        for told in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            os.kill(pid, told)
    # More than was on the way when the signals came.
    assert [process.stdout.readline() for _ in range(10)] == ["going on\n"] * 10
    assert shared_memory() - before, "nothing is passed on in shared memory"
    process.send_signal(number)
    process.wait(timeout=30)
    assert_nothing_is_left(workers, before)


@needs_proc
@pytest.mark.parametrize("how", ["leave", "close"])
def test_a_process_that_leaves_ends_its_workers_and_frees_what_they_passed_on(start, how):
    """With its stream still open, or at once after closing it."""
    before = shared_memory()
    process, workers = start(how)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "(40,)" in errors if how == "leave" else not errors
    assert "Traceback" not in errors and "leaked" not in errors
    assert_nothing_is_left(workers, before)
