"""What a process says before training begins: of its job's others, its devices, and a stop."""

import signal
import subprocess
import time

import pytest

from tests.support import started

SMALL = started.SMALL


def told(output):
    return [line for line in output.splitlines() if line.startswith("bigbatch: ")]


def test_who_does_not_come_is_named_and_waiting_for_it_ends(tmp_path):
    """Of three processes the first and the third are started."""
    port = started.free_port()
    waiting = [started.start(tmp_path, **SMALL, process=(index, 3), port=port,
                             flags=("--join_seconds=12",)) for index in (0, 2)]
    first, third = (told(started.end(process, status=42, seconds=60)) for process in waiting)
    assert len(first) == len(third) == 2
    assert first[0].startswith("bigbatch: waiting, for ") and first[1].startswith(
        "bigbatch: gave up after 12 s: ")
    for line in first:
        assert f"1 of the 2 other processes of the job have come to 127.0.0.1:{port} (from " in line
    assert "--join_seconds" in first[1] and "--coordinator" in first[1]
    assert f"the first process of the job, at 127.0.0.1:{port}, is there" in third[0]
    assert not any(tmp_path.iterdir())


def test_a_first_process_that_does_not_come_is_named(tmp_path):
    port = started.free_port()
    alone = started.start(tmp_path, **SMALL, process=(1, 2), port=port,
                          flags=("--join_seconds=7",))
    lines = told(started.end(alone, status=42, seconds=60))
    assert len(lines) == 2
    for line in lines:
        assert f"(--process=0) is not there: nothing listens at 127.0.0.1:{port}" in line


@pytest.mark.parametrize(("environment", "parts"), [
    ({"JAX_PLATFORMS": "cuda"}, ("JAX_PLATFORMS is 'cuda'", "no such devices", "Unset it")),
    ({"JAX_PLATFORMS": "nothing"}, ("JAX_PLATFORMS is 'nothing'", "not in the list")),
    ({"JAX_COORDINATOR_ADDRESS": "127.0.0.1:1"}, (
        "JAX_COORDINATOR_ADDRESS is '127.0.0.1:1'", "--processes", "unset the variable")),
])
def test_an_environment_that_cannot_be_is_one_line(tmp_path, environment, parts):
    workdir = tmp_path / "run"
    process = started.start_python(
        "-m", "bigbatch.main", "--config=tests/support/small_config.py:resident",
        f"--workdir={workdir}", "--compilation_cache=", **environment)
    output = started.end(process, status=2)
    assert len(output.splitlines()) == 1 and all(part in output for part in parts), output
    assert not workdir.exists()


def test_no_device_is_no_damage_of_a_checkpoint(tmp_path):
    """And an export needs none."""
    started.end(started.start(tmp_path / "run", **SMALL))
    process = started.start_python(
        "-m", "bigbatch.evaluate", f"--workdir={tmp_path}/run", JAX_PLATFORMS="cuda")
    output = started.end(process, status=2)
    assert len(output.splitlines()) == 1 and "JAX_PLATFORMS is 'cuda'" in output, output
    started.end(started.start_python(
        "-m", "bigbatch.export", f"--workdir={tmp_path}/run", f"--output={tmp_path}/net",
        JAX_PLATFORMS="cuda"))


@pytest.mark.parametrize(("number", "status"), [
    (signal.SIGTERM, 42), (signal.SIGHUP, 42), (signal.SIGUSR1, 42), (signal.SIGINT, 130)])
def test_a_signal_while_imports_run_is_heard(tmp_path, number, status):
    process = started.start_python(
        "-X", "importtime", "-m", "bigbatch.main", "--config=digits.py:increase",
        f"--workdir={tmp_path}/run")
    for line in process.stdout:
        if line.endswith("| jaxlib\n") or " jaxlib." in line:  # the first of the slow ones
            break
    process.send_signal(number)
    began = time.monotonic()
    try:
        output, _ = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert process.returncode == status, output
    assert "Traceback" not in output and len(told(output)) == 1, output
    assert time.monotonic() - began < 10
