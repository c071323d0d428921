"""launch/slurm.py: its script in a real bash, against stand-ins for SLURM and against SLURM."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from bigbatch.storage import checkpoint
from bigbatch.storage.logs import read_events
from tests.support import started
from tests.support.launch_standins import BARE, NASTY, REPOSITORY, Laptop
from tests.support.slurm_clusters import Real, StandIn

ENVIRONMENT = "BIGBATCH_TEST=it's $HOME"
FLAGS = ("--gpus-per-node=2", "--time=04:00:00", f"--python={sys.executable}", "--retry-seconds=0")
LONG = ("resident,recipe.epochs={epochs},log_every_epochs=2,eval_every_epochs=20,"
        "checkpoint_every_epochs=20")
# In place of bigbatch.main: writes down how it was started, and ends as config says.
MAIN = """
import json, os, pathlib, signal, sys, time
flags = dict(text[2:].split("=", 1) for text in sys.argv[1:])
process = int(os.environ["SLURM_PROCID"])
log = pathlib.Path(os.environ["BIGBATCH_STARTS"]) / f"starts{process}"
told = []
signal.signal(signal.SIGUSR1, lambda *_: told.append(1))
found = {"arguments": sys.argv[1:], "test": os.environ.get("BIGBATCH_TEST"),
         "setup": os.environ.get("SET_UP"), "local": os.environ["SLURM_LOCALID"],
         "parent": pathlib.Path(f"/proc/{os.getppid()}/cmdline").read_text().split("\\0")}
with log.open("a") as file:
    file.write(json.dumps(found) + "\\n")
if flags["config"] == "wait":
    while not told:
        time.sleep(0.01)
    os._exit(42)
if flags["config"] == "save":
    (pathlib.Path(flags["workdir"]) / f"checkpoints/{time.monotonic_ns()}").mkdir(parents=True)
    os._exit(42)
if flags["config"].startswith("["):
    end = json.loads(flags["config"])[process]
    if end < 0:
        os.kill(os.getpid(), -end)
    os._exit(end)
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    made = Laptop(tmp_path_factory.mktemp("laptop"))
    (made.root / "bigbatch/main.py").write_text(MAIN)
    return made.root


@pytest.fixture
def cluster(tmp_path):
    return StandIn(tmp_path / "cluster")


def call(cluster, root, *arguments, status=0):
    """Runs launch/slurm.py to its end; fails unless it ends with `status`."""
    done = subprocess.run(
        [*BARE, root / "launch/slurm.py", *arguments], cwd="/", text=True, capture_output=True,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"} | cluster.environment(), timeout=60)
    assert done.returncode == status, f"{done.returncode}:\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr, done.stderr
    return done


def submit(cluster, root, folder, *flags, job):
    """Submits a job named n; later flags count."""
    return call(cluster, root, "submit", "n", *FLAGS, f"--folder={folder}", *flags, "--", *job)


def job_of(config, workdir):
    return (f"--config={config}", f"--workdir={workdir}")


def run_to_the_end(cluster, folder, restarts=0):
    """Runs the submitted job once; its status and what it printed so far."""
    output = folder / "n-7.out"
    with cluster.started(output, restarts, BIGBATCH_STARTS=str(folder)) as process:
        status = process.wait(timeout=60)
    return status, output.read_text()


def starts(folder, process):
    return [json.loads(line) for line in (folder / f"starts{process}").read_text().splitlines()]


def test_a_dry_run_prints_what_a_run_does_and_does_nothing(cluster, checkout, tmp_path):
    arguments = ("submit", "n", *FLAGS, f"--folder={tmp_path}/new", "--nodes=2", "--")
    printed = call(cluster, checkout, arguments[0], "--dry-run", *arguments[1:], *NASTY).stdout
    assert cluster.calls() == [] and not (tmp_path / "new").exists()
    said = call(cluster, checkout, *arguments, *NASTY).stdout
    script = (tmp_path / "new/n.sbatch").read_text()
    assert printed == f"{script}\nsbatch --parsable {tmp_path}/new/n.sbatch\n"
    assert cluster.calls() == [["sbatch", "--parsable", f"{tmp_path}/new/n.sbatch"]]
    assert f"job 7; what it prints comes to {tmp_path}/new/n-7.out" in said


def test_sbatch_is_told_what_was_asked(cluster, checkout, tmp_path):
    submit(cluster, checkout, tmp_path, "--nodes=3", "--gpus-per-node=a100:4", "--cpus-per-gpu=8",
           "--partition=p", "--exclude=n[1-3],n7", "--warn-minutes=10", "--sbatch=--exclusive",
           job=NASTY)
    script = (tmp_path / "n.sbatch").read_text()
    told = [line.removeprefix("#SBATCH ") for line in script.splitlines() if "#SBATCH" in line]
    assert told == [
        "--job-name=n", "--nodes=3", "--ntasks-per-node=4", "--gpus-per-node=a100:4",
        "--time=04:00:00", "--signal=USR1@600", "--requeue", "--open-mode=append",
        f"--output={tmp_path}/n-%j.out", "--cpus-per-task=8", "--partition=p",
        "--exclude=n[1-3],n7", "--exclusive"]
    run_to_the_end(cluster, tmp_path)
    flags = json.loads((cluster.folder / "flags.json").read_text())
    assert {"nodes": "3", "ntasks": "12", "ntasks-per-node": "4", "gpus-per-node": "a100:4",
            "cpus-per-task": "8", "kill-on-bad-exit": "0"}.items() <= flags.items()
    assert [starts(tmp_path, process)[0]["local"] for process in range(12)] == list("0123" * 3)


def test_the_jobs_arguments_arrive_unharmed(cluster, checkout, tmp_path):
    submit(cluster, checkout, tmp_path, f"--env={ENVIRONMENT}",
           """--setup=export SET_UP="a  b" """, job=NASTY)
    status, output = run_to_the_end(cluster, tmp_path)
    assert (status, cluster.requeued()) == (0, False), output
    for process in range(2):
        found, = starts(tmp_path, process)
        assert found["arguments"] == [*NASTY]
        assert f"BIGBATCH_TEST={found['test']}" == ENVIRONMENT
        assert found["setup"] == "a  b"
        assert any(word.endswith("/srun") for word in found["parent"]), (
            "a signal goes to what srun started, which has to be Python itself")


@pytest.mark.parametrize("ends, status, requeued", [
    ([0, 0], 0, False), ([3, 3], 3, False), ([2, 2], 2, False), ([1, 1], 1, False),
    ([42, 42], 42, True), ([42, 0], 42, True),
    ([1, 42], 1, False), ([42, 1], 1, False),  # 1 would come again, 42 follows from it
    ([2, -9], 2, False), ([-9, 42], 137, True), ([42, -6], 42, True), ([1, -6], 1, False),
])
def test_the_job_ends_or_goes_on_as_its_processes_say(
    cluster, checkout, tmp_path, ends, status, requeued
):
    submit(cluster, checkout, tmp_path, job=job_of(json.dumps(ends), "gs://b/run"))
    found, output = run_to_the_end(cluster, tmp_path)
    assert (found, cluster.requeued()) == (status, requeued), output


@pytest.mark.parametrize("state, reason, requeued", [
    ("RUNNING", "None", True), ("COMPLETING", "TimeLimit", True),
    ("COMPLETING", "None", False), ("CANCELLED", "None", False), ("PREEMPTED", "None", False),
])
def test_a_job_that_was_cancelled_stays_so(cluster, checkout, tmp_path, state, reason, requeued):
    submit(cluster, checkout, tmp_path, job=job_of([42, 42], "gs://b/run"))
    cluster.state(state, reason)
    status, output = run_to_the_end(cluster, tmp_path)
    assert (status, cluster.requeued()) == (42, requeued)
    assert requeued or f"SLURM calls it {state}" in output


def test_starts_that_lead_nowhere_come_to_an_end(cluster, checkout, tmp_path):
    submit(cluster, checkout, tmp_path, "--fruitless=2", job=job_of([42, 42], tmp_path))
    assert run_to_the_end(cluster, tmp_path)[0] == 42 and cluster.requeued()
    submit(cluster, checkout, tmp_path, "--fruitless=2", job=job_of("save", tmp_path))
    for restarts in range(1, 4):
        run_to_the_end(cluster, tmp_path, restarts)
        assert cluster.requeued(), "each left a new checkpoint"
    submit(cluster, checkout, tmp_path, "--fruitless=2", job=job_of([42, -9], tmp_path))
    assert run_to_the_end(cluster, tmp_path)[0] == 137 and cluster.requeued()
    status, output = run_to_the_end(cluster, tmp_path)
    assert (status, cluster.requeued()) == (137, False)
    assert "2 starts in a row left no new checkpoint" in output
    submit(cluster, checkout, tmp_path, "--restarts=5", job=job_of("save", tmp_path))
    run_to_the_end(cluster, tmp_path, restarts=4)
    assert cluster.requeued()
    run_to_the_end(cluster, tmp_path, restarts=5)
    assert not cluster.requeued()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_what_the_script_is_told_its_processes_hear_as_a_warning(
    cluster, checkout, tmp_path, number
):
    submit(cluster, checkout, tmp_path, job=job_of("wait", "gs://b/run"))
    with cluster.started(tmp_path / "out", BIGBATCH_STARTS=str(tmp_path)) as process:
        until = time.monotonic() + 60
        while not all((tmp_path / f"starts{index}").exists() for index in range(2)):
            assert process.poll() is None and time.monotonic() < until, "never started"
            time.sleep(0.01)
        process.send_signal(number)
        assert process.wait(timeout=60) == 42


@pytest.mark.parametrize("flags, job, named", [
    ((), ("--config=x",), "--workdir=... is missing"),
    ((), job_of("x", "relative"), "--workdir=relative"),
    ((), (*NASTY, "--coordinator=host:1"), "--coordinator=host:1"),
    ((), (*NASTY, "-processes=2"), "-processes=2"),
    (("--gpus-per-node=0",), NASTY, "--gpus-per-node=0"),
    (("--gpus-per-node=four",), NASTY, "--gpus-per-node=four"),
    (("--nodes=0",), NASTY, "--nodes=0"),
    (("--time=soon",), NASTY, "--time=soon"),
    (("--time=5",), NASTY, "--warn-minutes=5"),
    (("--warn-minutes=0",), NASTY, "--warn-minutes=0"),
    (("--partition=a b",), NASTY, "--partition=a b"),
    (("--sbatch=exclusive",), NASTY, "exclusive"),
    (("--folder=a b",), NASTY, "a b"),
    (("--setup= ",), NASTY, "--setup"),
    (("--env=X",), NASTY, "--env=X"),
    (("--python=missing",), NASTY, "--python=missing"),
    (("--fruitless=0",), NASTY, "--fruitless=0"),
])
def test_a_mistake_is_one_line_and_nothing_is_submitted(
    cluster, checkout, tmp_path, flags, job, named
):
    said = call(cluster, checkout, "submit", "n", *FLAGS, f"--folder={tmp_path}/new", *flags, "--",
                *job, status=2).stderr
    assert named in said and len(said.splitlines()) == 1, said
    assert cluster.calls() == [] and not (tmp_path / "new").exists()


@pytest.mark.parametrize("time, minutes", [
    ("90", 90), ("90:30", 90.5), ("04:00:00", 240), ("2-12", 3600), ("1-00:30", 1470),
    ("1-00:00:30", 1440.5),
])
def test_the_warning_comes_before_the_limit_however_it_is_written(
    cluster, checkout, tmp_path, time, minutes
):
    def warned(warning, status):
        flags = ("--dry-run", *FLAGS, f"--time={time}", f"--warn-minutes={warning}")
        call(cluster, checkout, "submit", "n", *flags, "--", *NASTY, status=status)

    if minutes <= 1000:
        warned(minutes - 0.01, 0)
        warned(minutes, 2)
    else:
        warned(1000, 0)
        warned(1001, 2)


# --- real processes ------------------------------------------------------------------------------
def real_job(workdir, epochs):
    return (*job_of(f"tests/support/small_config.py:{LONG.format(epochs=epochs)}", workdir),
            f"--compilation_cache={started.CACHE}")


@pytest.mark.slow  # its parts are in the tests above
def test_a_run_that_is_warned_goes_on_to_its_end(cluster, tmp_path):
    """Two processes, which find one another by SLURM's variables; the bits are those of an unbroken
    run."""
    workdir, output = tmp_path / "run", tmp_path / "n-7.out"
    job = real_job(workdir, epochs=400)
    submit(cluster, REPOSITORY, tmp_path, "--env=JAX_PLATFORMS=cpu", "--env=XLA_FLAGS=", job=job)
    with cluster.started(output) as process:
        started.wait_until(
            lambda: len(read_events(workdir / "metrics.jsonl")) > 8, process, "8 events")
        cluster.warn()
        assert process.wait(timeout=60) == 42, output.read_text()
    assert cluster.requeued()
    saved = checkpoint.find_newest(workdir).run["examples_seen"]
    assert 0 < saved < 400 * 160
    with cluster.started(output, restarts=1) as process:
        assert process.wait(timeout=240) == 0, output.read_text()
    assert not cluster.requeued()
    events = [e for e in read_events(workdir / "timing.jsonl") if e["event"] == "start"]
    assert [(e["examples_seen"], e["devices"]) for e in events] == [(0, 2), (saved, 2)]
    for one in started.start_job(
        tmp_path / "never", processes=2, **started.SMALL | {"config": (LONG.format(epochs=400),)}
    ):
        started.end(one)
    assert started.bits_different(workdir, tmp_path / "never") == 0


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    made = Real(tmp_path_factory.mktemp("slurm"))
    problem = made.start()
    if problem:
        pytest.skip(f"no SLURM: {problem}")
    yield made
    made.stop()


def number_of(submitted):
    return submitted.stdout.split()[2].rstrip(";")


def follow(slurm, number, folder, ready, seconds=90):
    """Waits for something that happens to a job; fails with what SLURM and the job say of it."""
    try:
        slurm.until(ready, seconds)
    except TimeoutError:
        output = folder / f"n-{number}.out"
        pytest.fail(f"{slurm.job(number)}\n{output.read_text() if output.exists() else ''}")


@pytest.mark.parametrize("ends, status, requeued", [
    ([3, 3], 3, False), ([42, 1], 1, False), ([2, -9], 2, False),
    ([-9, 42], 137, True), ([42, -6], 42, True), ([42, 42], 42, True),
])
def test_the_words_of_slurm_are_understood(slurm, checkout, tmp_path, ends, status, requeued):
    number = number_of(submit(
        slurm, checkout, tmp_path, "--nodes=2", "--gpus-per-node=1",
        f"--env=BIGBATCH_STARTS={tmp_path}", job=job_of(json.dumps(ends), "gs://b/run")))
    if requeued:
        follow(slurm, number, tmp_path, lambda: slurm.job(number)["JobState"] == "PENDING"
               and slurm.job(number)["Restarts"] == "1")
        slurm.run("scancel", number)
        assert f"the job ended with {status} and goes" in (tmp_path / f"n-{number}.out").read_text()
    else:
        follow(slurm, number, tmp_path, lambda: slurm.job(number)["JobState"] == "FAILED")
        assert slurm.job(number)["ExitCode"] == f"{status}:0"


@pytest.mark.slow  # it waits for SLURM's clock; a stand-in for SLURM warns in the tests above
def test_slurm_warns_starts_again_and_cancels(slurm, tmp_path):
    """On two nodes: SLURM's own warning before the limit, and then `scancel`."""
    workdir = tmp_path / "run"
    number = number_of(submit(
        slurm, REPOSITORY, tmp_path, "--nodes=2", "--gpus-per-node=1", "--time=60",
        "--warn-minutes=1", "--env=JAX_PLATFORMS=cpu", "--env=XLA_FLAGS=",
        job=real_job(workdir, epochs=1_000_000)))

    def begun():
        return [event for event in read_events(workdir / "timing.jsonl")
                if event["event"] == "start"]

    def limit(minutes):
        slurm.run("scontrol", "update", f"JobId={number}", f"TimeLimit={minutes}")

    follow(slurm, number, tmp_path, lambda: checkpoint.finished(workdir), 150)
    hours, minutes, _ = map(int, slurm.job(number)["RunTime"].split(":"))
    limit(60 * hours + minutes + 2)  # SLURM warns up to half a minute before it was asked to
    follow(slurm, number, tmp_path, lambda: slurm.job(number)["Restarts"] == "1", 120)
    limit(60)
    saved = checkpoint.find_newest(workdir).run["examples_seen"]
    follow(slurm, number, tmp_path, lambda: len(begun()) == 2, 150)
    assert [(event["devices"], event["examples_seen"]) for event in begun()] == [(2, 0), (2, saved)]
    output = tmp_path / f"n-{number}.out"
    assert "the job ended with 42 and goes back into the queue" in output.read_text()
    follow(slurm, number, tmp_path,
           lambda: read_events(workdir / "metrics.jsonl")[-1]["examples_seen"] > saved)
    slurm.run("scancel", number)
    follow(slurm, number, tmp_path, lambda: slurm.job(number)["JobState"] == "CANCELLED")
    assert checkpoint.find_newest(workdir).run["examples_seen"] > saved, "saved once more"
    assert "left to SLURM" in output.read_text()
