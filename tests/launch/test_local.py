"""launch/local.py: real processes as one job; what ends it, what starts it again."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from bigbatch.storage import checkpoint
from tests.support.launch_standins import BARE, Laptop
from tests.support.started import CACHE, REPOSITORY

# In place of bigbatch.main: writes down that it was started, and ends as it is told.
STAND_IN = """
import json, os, pathlib, signal, sys, time
flags = dict(text[2:].split("=", 1) for text in sys.argv[1:])
folder = pathlib.Path(flags["workdir"])
process = int(flags["process"])
log = folder / f"starts{process}"
with log.open("a") as file:
    file.write(json.dumps([flags, os.environ.get("XLA_FLAGS")]) + "\\n")
told = []
signal.signal(signal.SIGTERM, lambda *_: told.append(1))
print("hello", "error", sep="\\n", file=sys.stderr)
if flags["config"] == "wait":
    (folder / f"ready{process}").touch()
    while not told:
        time.sleep(0.01)
    time.sleep(0.3)  # a second signal would be seen
    (folder / f"told{process}").write_text(str(len(told)))
    os._exit(42)
ends = json.loads(flags["config"])
end = ends[min(len(log.read_text().splitlines()), len(ends)) - 1][process]
if end < 0:
    os.kill(os.getpid(), -end)
os._exit(end)
"""


@pytest.fixture(scope="module")
def laptop(tmp_path_factory):
    made = Laptop(tmp_path_factory.mktemp("laptop"))
    (made.root / "bigbatch/main.py").write_text(STAND_IN)
    return made


def starts(folder, process):
    return [json.loads(line) for line in (folder / f"starts{process}").read_text().splitlines()]


@pytest.mark.parametrize("ends, restarts, status, started", [
    ([[0, 0]], 0, 0, 1),
    ([[1, 0]], 5, 1, 1),
    ([[2, 2]], 5, 2, 1),
    ([[3, 3]], 5, 3, 1),
    ([[42, 42], [0, 0]], 0, 42, 1),
    ([[42, 42], [0, 0]], 2, 0, 2),
    ([[1, -9], [-6, -9], [0, 0]], 2, 0, 3),
    ([[42, 42]], 2, 42, 3),
    ([[-6, 1]], 2, 1, 1),
    ([[1, 42]], 2, 1, 1),
])
def test_how_a_job_ends_and_is_started_again(laptop, tmp_path, ends, restarts, status, started):
    """A killed process makes the others fail (1), be aborted by JAX (-6), or end with 42, and one
    that failed makes them do the latter two: neither is the cause."""
    laptop.launch("local", "--processes=2", f"--restarts={restarts}", "--",
                  f"--config={json.dumps(ends)}", f"--workdir={tmp_path}", status=status)
    assert len(starts(tmp_path, 0)) == len(starts(tmp_path, 1)) == started


def test_the_processes_are_told_of_one_another(laptop, tmp_path):
    """Wherever it is called: relative paths begin there, and the code is that of the checkout."""
    (tmp_path / "run").mkdir()
    said = subprocess.run(
        [*BARE, laptop.root / "launch/local.py", "--processes=3", "--devices-per-process=2", "--",
         "--config=[[0,0,0]]", "--workdir=run"], cwd=tmp_path, env=laptop.environment(), text=True,
        capture_output=True, check=True, timeout=60).stdout
    for process in range(3):
        assert f"[{process}] hello" in said.splitlines()
    told = [starts(tmp_path / "run", process)[0] for process in range(3)]
    assert [flags["process"] for flags, _ in told] == ["0", "1", "2"]
    assert len({(flags["coordinator"], flags["processes"]) for flags, _ in told}) == 1
    assert all("--xla_force_host_platform_device_count=2" in flags for _, flags in told)


@pytest.mark.parametrize("number, whom", [(signal.SIGTERM, "one"), (signal.SIGINT, "group")])
def test_a_stop_reaches_every_process_once_and_nothing_starts_again(
    laptop, tmp_path, number, whom
):
    job = subprocess.Popen(
        [sys.executable, "launch/local.py", "--processes=2", "--restarts=5", "--", "--config=wait",
         f"--workdir={tmp_path}"], cwd=laptop.root, env=laptop.environment(),
        stdout=subprocess.DEVNULL, process_group=0,
    )
    until = time.monotonic() + 60
    while not all((tmp_path / f"ready{process}").exists() for process in range(2)):
        assert job.poll() is None and time.monotonic() < until, "never started"
        time.sleep(0.01)
    # A terminal's Ctrl-C goes to all of the group that it sees.
    (os.kill if whom == "one" else os.killpg)(job.pid, number)
    assert job.wait(timeout=60) == 42
    for process in range(2):
        assert (tmp_path / f"told{process}").read_text() == "1"
        assert len(starts(tmp_path, process)) == 1


def test_a_dry_run_prints_the_commands(laptop, tmp_path):
    said = laptop.launch("local", "--dry-run", "--port=8476", "--", "--config=[[0,0]]",
                         f"--workdir={tmp_path}").stdout.splitlines()
    assert len(said) == 2 and not any(tmp_path.iterdir())
    done = subprocess.run(["bash", "-c", said[1]], cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert starts(tmp_path, 1)[0][0]["coordinator"] == "127.0.0.1:8476"


def test_the_thirty_minutes_run_for_real_on_small_slices(tmp_path):
    """Two phases: the first on 1 x 2 devices, the second, from the same workdir, on 2 x 2."""
    workdir = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "launch/thirty_minutes.py", "--platform=local", "--first=1x2",
         "--second=2x2", "--config=tests/support/small_config.py:resident",
         f"--workdir={workdir}", "--",
         f"--compilation_cache={CACHE}"],
        cwd=REPOSITORY, text=True, capture_output=True, timeout=240,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    events = [json.loads(line) for line in (workdir / "timing.jsonl").read_text().splitlines()]
    began = [event for event in events if event["event"] == "start"]
    assert [event["devices"] for event in began] == [2, 4]
    assert [event["examples_seen"] for event in began] == [0, 7 * 48]
    assert checkpoint.find_newest(workdir).run["examples_seen"] == 7 * 48 + 2 * 96
    assert "[1] " in done.stdout, "two processes print, each with its number"
