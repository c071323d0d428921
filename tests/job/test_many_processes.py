"""Real jobs of several processes on this machine's CPU: the same run, whatever happens to it."""

import contextlib
import shutil
import signal
import socket
import time

import pytest

from bigbatch.storage import checkpoint
from bigbatch.storage.logs import read_events
from tests.support import started

SMALL = started.SMALL
# 14 updates of 24 examples, 7 of 48 and 3 of 96. The noise scale is measured over 11 ghost batches.
FLOAT64 = ("dtype=float64", "recipe.batch_size=24", "recipe.falls=((2,2),(4,2))",
           "recipe.epochs=6", "noise.every_epochs=0.9", "noise.ghosts=11")
# For the tests that have to catch it running.
LONG = ("recipe.epochs=5000", "log_every_epochs=2", "eval_every_epochs=20",
        "checkpoint_every_epochs=20")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A float64 run on one process of 8 devices, and its state after the first phase."""
    folder = tmp_path_factory.mktemp("whole")
    handed = folder / "handed"
    started.end(
        started.start(
            handed, *FLOAT64, **SMALL, devices=8, flags=("--stop_after_phase=0",)),
        status=3,
    )
    assert checkpoint.find_newest(handed).run["updates"] == 14
    started.end(started.start(folder / "run", *FLOAT64, **SMALL, devices=8))
    return folder


def handed_over(whole, folder):
    """A copy of the run as it stands after its first phase."""
    shutil.copytree(whole / "handed", folder)
    return folder


def check_same_curve(workdir, whole):
    """The same state, and the same lines: also of the noise scale, by the norms and by all."""
    assert started.relative_difference(workdir, whole / "run") < 1e-10
    lines = started.assert_same_lines(workdir, whole / "run")
    assert sum("noise_full" in line for line in lines) > 5
    assert any(line["noise_measured"] for line in lines)


@pytest.mark.parametrize(("devices", "split"), [(1, ""), (2, "optimizer"), (4, "parameters")])
def test_a_checkpoint_of_8_devices_goes_on_with_fewer(whole, tmp_path, devices, split):
    workdir = handed_over(whole, tmp_path / "run")
    settings = (f"sharding.{split}=true", "sharding.smallest=1") if split else ()
    started.end(started.start(workdir, *FLOAT64, *settings, **SMALL, devices=devices))
    assert checkpoint.find_newest(workdir).run["updates"] == 24
    check_same_curve(workdir, whole)


def test_from_one_process_to_two_and_from_one_device_to_six(whole, tmp_path):
    """Phase 0 on 8 devices of one process, 1 on one device, 2 on two processes of 3.

    There two devices share the optimizer's state, of which one pair has a device of each process.
    """
    split = ("sharding.optimizer=true", "sharding.smallest=1", "sharding.shards=2")
    workdir = handed_over(whole, tmp_path / "run")
    started.end(
        started.start(
            workdir, *FLOAT64, **SMALL, devices=1, flags=("--stop_after_phase=noise/2",)),
        status=3,
    )
    for process in started.start_job(workdir, *FLOAT64, *split, **SMALL, processes=2, devices=3):
        started.end(process)
    check_same_curve(workdir, whole)
    starts = [e["devices"] for e in read_events(workdir / "timing.jsonl") if e["event"] == "start"]
    assert starts == [8, 1, 6]


@pytest.mark.parametrize("told, number", [
    ("one", signal.SIGTERM),
    pytest.param("one", signal.SIGHUP, marks=pytest.mark.slow),
    pytest.param("all", signal.SIGTERM, marks=pytest.mark.slow),
    ("all", signal.SIGUSR1),  # as SLURM warns
])
def test_a_signal_ends_all_processes_with_one_agreed_checkpoint(tmp_path, told, number):
    """A job of two stopped so, and continued, has the bits of a job of two never stopped."""
    workdir = tmp_path / "run"
    passes = ["microbatches=2"] * (told == "one")  # a stop then falls between microbatches too
    if (told, number) == ("one", signal.SIGHUP):  # and each of these gathers the parameters
        passes += ["sharding.parameters=true", "sharding.smallest=1"]
    job = started.start_job(workdir, *LONG, *passes, **SMALL, processes=2, devices=2)
    log = workdir / "metrics.jsonl"
    started.wait_until(lambda: len(read_events(log)) > 8, job[0], "8 events")
    began = time.monotonic()
    for process in job[1:] if told == "one" else job:
        process.send_signal(number)
    for process in job:
        started.end(process, status=42, seconds=60)
    assert time.monotonic() - began < 15
    found = checkpoint.find_newest(workdir)
    assert found.run["examples_seen"] >= read_events(log)[-1]["examples_seen"]
    assert not list((workdir / "checkpoints").glob("*.unfinished"))
    if (told, number) != ("all", signal.SIGTERM):
        return
    short = ("recipe.epochs=100",)
    assert found.run["examples_seen"] < 100 * 160, "stopped too late for the comparison below"
    for folder in (workdir, tmp_path / "never"):
        for process in started.start_job(
            folder, *LONG, *short, **SMALL, processes=2, devices=2
        ):
            started.end(process)
    assert started.bits_different(workdir, tmp_path / "never") == 0
    assert log.read_bytes() == (tmp_path / "never/metrics.jsonl").read_bytes()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_while_waiting_for_the_others_ends_at_once(tmp_path, number):
    port = started.free_port()
    alone = started.start(tmp_path, **SMALL, process=(0, 2), port=port)

    def listens():
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port), 0.2).close()
            return True

    # Then it waits for a process that never comes.
    started.wait_until(listens, alone, "its port", seconds=60)
    alone.send_signal(number)
    started.end(alone, status=42, seconds=10)


@pytest.mark.parametrize("killed", [0, 1])
def test_a_dead_peer_ends_the_job_which_says_why_and_goes_on_together(tmp_path, killed):
    job = started.start_job(
        tmp_path, *LONG, **SMALL, processes=2, devices=2, flags=("--dead_peer_seconds=10",)
    )
    log = tmp_path / "timing.jsonl"
    started.wait_until(
        lambda: len(checkpoint.finished(tmp_path)) > 0, job[0], "its first checkpoint")
    job[killed].kill()
    began = time.monotonic()
    job[killed].communicate()
    output, _ = job[1 - killed].communicate(timeout=60)
    assert time.monotonic() - began < 30
    assert job[1 - killed].returncode in (42, -6), output  # ours; JAX's own
    # Ours where an update fails first, JAX's own where the first process, which holds the job
    # together, is the dead one.
    assert "another process of the job" in output or "another task died" in output, output
    seen = checkpoint.find_newest(tmp_path).run["examples_seen"]
    job = started.start_job(tmp_path, *LONG, **SMALL, processes=2, devices=2)
    started.wait_until(
        lambda: [event["examples_seen"] for event in read_events(log)
                 if event["event"] == "start"] == [0, seen], job[0], "its second start")
    for process in job:
        process.send_signal(signal.SIGTERM)
    for process in job:
        started.end(process, status=42, seconds=60)


def test_what_the_first_process_refuses_all_refuse(whole):
    job = started.start_job(whole / "run", *FLOAT64, "seed=4", **SMALL, processes=2)
    for process in job:
        output = started.end(process, status=2, seconds=120)
        assert "seed: 0 saved, 4 now" in output
        assert len([x for x in output.splitlines() if x.startswith("bigbatch:")]) == 1, output


def test_a_job_that_is_only_half_described_is_refused(tmp_path):
    flags = ("--processes=2", "--process=0")
    output = started.end(started.start(tmp_path, flags=flags), status=2)
    assert "--coordinator=''" in output and "all three are needed" in output
    assert not any(tmp_path.iterdir())
