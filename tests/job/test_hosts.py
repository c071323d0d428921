"""Jobs of several processes: each feeds its own devices only, and the curve does not change."""

import contextlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from bigbatch import train
from bigbatch.config import make_layouts, make_phases
from bigbatch.job import preemption, processes, signals
from bigbatch.schedule.layout import ghosts_by_slot
from bigbatch.storage import checkpoint
from bigbatch.storage.logs import read_events
from tests.data.test_sources import prepare
from tests.support import started
from tests.support.small_config import get_config

INPUTS = ("resident", "streaming")
# A process of a job that trains on both inputs and notes which images it reads.
SCRIPT = """
import json, sys
from pathlib import Path
from bigbatch import train
from bigbatch.data import streaming
from bigbatch.job import processes
from bigbatch.programs import program_cache
from tests.support.small_config import get_config

folder, data, cache, *place = sys.argv[1:]
processes.join(*(place[0], int(place[1]), int(place[2])) if place else ("", 0, -1), 60)
program_cache.keep(cache)
read, reads = streaming.Split.read, {"train": [], "test": []}

def noting(split, position):
    reads["train" if split.train else "test"].append(position)
    return read(split, position)

streaming.Split.read = noting
for name in ("resident", f"streaming,data.dir={data}"):
    config = get_config(f"{name},dtype=float64,checkpoint_every_epochs=9")
    train.train_and_evaluate(config, f"{folder}/{name.partition(',')[0]}", show=False)
Path(f"{folder}/reads{place[2] if place else 0}.json").write_text(json.dumps(reads))
processes.leave(0, together=True)
"""


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """A TFDS data set of 160 small JPEGs of several sizes."""
    folder = tmp_path_factory.mktemp("photographs")
    generator = np.random.default_rng(0)

    def photograph(number):
        coarse = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((16 + number % 9, 20), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=90)
        return buffer.getvalue()

    prepare(folder, [photograph(i) for i in range(160)], name="photographs", channels=3)
    return folder


def train_both(folder, photographs, hosts):
    """The runs of SCRIPT in `folder`, by `hosts` processes with 8 devices between them."""
    arguments = ["-c", SCRIPT, str(folder), str(photographs), str(started.CACHE)]
    address = f"127.0.0.1:{started.free_port()}"
    running = [
        started.start_python(
            *arguments, *((address, str(hosts), str(index)) if hosts > 1 else ()),
            devices=8 // hosts,
        )
        for index in range(hosts)
    ]
    for process in running:
        started.end(process)
    return folder


@pytest.fixture(scope="module")
def one_by_eight(tmp_path_factory, photographs):
    """Both inputs, trained by one process of 8 devices."""
    return train_both(tmp_path_factory.mktemp("one_by_eight"), photographs, hosts=1)


@pytest.mark.slow  # two processes of one host give it in test_many_processes.py
@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_that_feed_their_own_devices_give_the_curve_of_one(
    one_by_eight, photographs, tmp_path, hosts
):
    train_both(tmp_path, photographs, hosts)
    for name in INPUTS:
        events, expected = (
            read_events(folder / name / "metrics.jsonl") for folder in (tmp_path, one_by_eight))
        assert {event["batch_size"] for event in expected} == {48, 96}
        assert sum("test_accuracy" in event for event in expected) >= 2
        assert len(events) == len(expected)
        for event, other in zip(events, expected, strict=True):
            assert event.pop("phase") == other.pop("phase")
            assert event == pytest.approx(other, rel=1e-10), name
        assert started.relative_difference(tmp_path / name, one_by_eight / name) < 1e-10
    check_reads(tmp_path, hosts)


def check_reads(folder, hosts):
    """Each process has read its own devices' images, once, and so all of them together."""
    config = get_config("streaming")
    phases = make_phases(config)
    devices = 8 // hosts
    for host in range(hosts):
        reads = json.loads((folder / f"reads{host}.json").read_text())
        own = slice(host * devices, (host + 1) * devices)
        expected = []
        for phase, layout in zip(phases, make_layouts(config, phases, 8), strict=True):
            ghosts = ghosts_by_slot(layout)[:, own]
            places = [ghost * config.ghost_size + place for ghost in ghosts[ghosts >= 0]
                      for place in range(config.ghost_size)]
            expected += [start + place for place in places
                         for start in range(phase.start_example, phase.end_example,
                                            phase.batch_size)]
        assert sorted(reads["train"]) == sorted(expected), f"process {host} of {hosts}"
        each = -(-config.data.test_examples // 8)
        records = set(range(host * devices * each, (host + 1) * devices * each))
        assert set(reads["test"]) == records & set(range(config.data.test_examples))


def test_an_update_without_an_image_of_use_is_no_divergence_in_any_process(tmp_path):
    prepare(tmp_path / "data", [b"no image"] * 160, name="photographs", channels=3)
    job = started.start_job(
        tmp_path / "run", f"data.dir={tmp_path}/data", "data.on_bad_image=skip", processes=2,
        file="tests/support/small_config.py", config=("streaming",))
    for process in job:
        output = started.end(process, status=2)
        assert "bigbatch: no example of the update from example 0 is of use: all were" in output
        assert "diverged" not in output
    events = read_events(tmp_path / "run/timing.jsonl")
    assert events and not [event for event in events if event["event"] == "diverged"]


def workers_of(pid):
    """The processes that a training process has started to decode images."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == pid and b"spawn_main" in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
    return sorted(found)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks into /proc")
def test_a_killed_worker_is_one_line_that_says_what_to_change(photographs, tmp_path):
    process = started.start(
        tmp_path, f"data.dir={photographs}", "data.workers=2", "recipe.epochs=5000",
        "tensorboard=false", file="tests/support/small_config.py", config=("streaming",))
    log = tmp_path / "metrics.jsonl"
    started.wait_until(log.exists, process, "a line")
    os.kill(workers_of(process.pid)[1], signal.SIGKILL)
    output = started.end(process, status=2, seconds=60)
    lines = [line for line in output.splitlines() if "killed by SIGKILL" in line]
    assert len(lines) == 1 and re.match("bigbatch: worker [01] of 0 to 1, a", lines[0])
    assert "memory" in lines[0] and "--config.data.workers" in lines[0]
    assert "Traceback" not in output and "semaphore" not in output, output


# --- what calls training without a job ------------------------------------------------------------
def test_sigterm_is_heard_in_a_script_that_joined_no_job(tmp_path):
    script = """
import sys
from bigbatch import train
from bigbatch.programs import program_cache
from tests.support.small_config import get_config

program_cache.keep(sys.argv[2])
try:
    train.train_and_evaluate(get_config("resident,recipe.epochs=3000"), sys.argv[1])
except train.Preempted as stopped:
    print("Preempted:", stopped)
"""
    process = started.start_python("-c", script, str(tmp_path), str(started.CACHE))
    log = tmp_path / "metrics.jsonl"
    # The second phase: nothing is left to compile.
    started.wait_until(
        lambda: log.exists() and read_events(log)[-1:] and read_events(log)[-1]["batch_size"] == 96,
        process, "its second phase")
    process.send_signal(signal.SIGTERM)
    output = started.end(process, seconds=30)
    saved = checkpoint.find_newest(tmp_path).run["examples_seen"]
    assert output.splitlines()[-1] == f"Preempted: told to stop at example {saved}", output
    assert saved >= read_events(log)[-1]["examples_seen"]


def test_a_signal_while_data_are_loaded_ends_the_process_at_once(tmp_path):
    """In the second of two runs, as a command may train several."""
    script = """
import sys, time
from pathlib import Path
from bigbatch.job import signals
signals.end_on_signals()
from bigbatch import train
from bigbatch.programs import program_cache
from bigbatch.tasks import contract
from tests.support.small_config import get_config

program_cache.keep(sys.argv[2])
folder = Path(sys.argv[1])
train.train_and_evaluate(get_config("resident"), folder / "first")
contract.load = lambda *_: ((folder / "loading").touch(), time.sleep(60))
train.train_and_evaluate(get_config("resident"), folder / "second")
"""
    process = started.start_python("-c", script, str(tmp_path), str(started.CACHE))
    started.wait_until((tmp_path / "loading").exists, process, "its second run")
    process.send_signal(signal.SIGTERM)
    assert "told to stop before training began" in started.end(process, status=42, seconds=10)
    assert [path.name for path in (tmp_path / "second").iterdir()] == ["lock"]


def test_a_signal_just_before_training_listens_is_not_lost(monkeypatch):
    monkeypatch.setattr(signals, "_heard_elsewhere", threading.Event())
    monkeypatch.setattr(signals, "_left", threading.Event())
    before = signal.signal(signal.SIGTERM, signals._left_to_the_thread)
    try:
        signal.raise_signal(signal.SIGTERM)  # and the thread has not had its turn
        _assert_stops(preemption.Watch())
        signals._left.clear()
        end = signals.heard_elsewhere
        monkeypatch.setattr(signals, "heard_elsewhere", lambda: (
            signal.raise_signal(signal.SIGTERM), end())[1])
        _assert_stops(preemption.Watch())
    finally:
        signal.signal(signal.SIGTERM, before)


def _assert_stops(watch):
    watch.close()
    with pytest.raises(preemption.Stop):
        watch.poll()


def test_training_outside_the_main_thread_works_and_says_that_sigterm_is_not_handled(tmp_path):
    states = []
    thread = threading.Thread(
        target=lambda: states.append(
            train.train_and_evaluate(get_config("resident"), tmp_path, show=False)))
    with pytest.warns(UserWarning, match="SIGTERM is not handled") as warned:
        thread.start()
        thread.join()
    assert len([w for w in warned if "SIGTERM" in str(w.message)]) == 1
    assert warned[0].filename == __file__, "it does not point at the caller"
    saved = checkpoint.load(tmp_path)["params"]
    jax.tree.map(np.testing.assert_array_equal, saved, jax.tree.map(np.asarray, states[0].params))


def test_the_file_that_a_notebook_has_told_of_signals_is_told_again_after_training():
    reader, writer = socket.socketpair()
    with reader, writer:
        writer.setblocking(False)
        before = signal.set_wakeup_fd(writer.fileno())
        try:
            preemption.Watch().close()
            assert signal.set_wakeup_fd(writer.fileno()) == writer.fileno()
        finally:
            signal.set_wakeup_fd(before)


def test_processes_that_were_never_joined_are_told_how_to(monkeypatch):
    """As on a TPU pod, where JAX knows of the other hosts without jax.distributed.initialize."""
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(ValueError, match=r"sees 4 processes.*jax.distributed.initialize\(\)"):
        processes.decided_by_first("run", dict)


@pytest.mark.parametrize("coordinator", ["10.0.0.1", "10.0.0.1:", ":8476", "10.0.0.1:port"])
def test_a_coordinator_without_a_port_is_refused(coordinator):
    with pytest.raises(ValueError, match=f"--coordinator='{coordinator}'.*host:port"):
        processes.join(coordinator, 2, 0, 60)


def test_a_machine_that_cannot_resolve_its_own_name_trains_alone(tmp_path):
    """On four devices, and to the same bits as where the name resolves."""
    alone = ["unshare", "--uts", "sh", "-c", 'hostname no.such.name.invalid && exec "$@"', "sh"]
    if os.geteuid() or subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("needs a namespace for host names of its own")
    for name, on in (("named", ()), ("unnamed", tuple(alone))):
        started.end(started.start(tmp_path / name, **started.SMALL, devices=4, on=on))
    assert (tmp_path / "named/metrics.jsonl").read_bytes() == (
        tmp_path / "unnamed/metrics.jsonl").read_bytes()


# --- the ends of a job ----------------------------------------------------------------------------
def test_on_cloud_tpu_the_coordinator_listens_on_the_port_that_pods_have_open():
    """JAX's own detection, which reads these variables on GKE; forced, for want of a TPU."""
    process = started.start_python(
        "-c", "from jax._src import distributed; from bigbatch.job import processes;"
        "processes.join('', 0, -1, 60);"
        "print(distributed.global_state.coordinator_address)",
        JAX_FORCE_TPU_INIT="1", TPU_WORKER_HOSTNAMES="127.0.0.1", TPU_WORKER_ID="0",
        MEGASCALE_COORDINATOR_ADDRESS="127.0.0.1", MEGASCALE_NUM_SLICES="1", MEGASCALE_SLICE_ID="0",
    )
    assert started.end(process).splitlines()[-1] == "127.0.0.1:8476"


@pytest.mark.parametrize("dies", [False, True])
def test_a_peer_that_dies_at_the_very_end_does_not_change_the_others_status(dies):
    """Both have saved; one is killed before it says so, or not."""
    script = """
import os, signal, sys, time
from bigbatch.job import processes

address, process, dies = sys.argv[1:]
processes.END_SECONDS = 3
processes.join(address, 2, int(process), 60)
if process == "1":
    time.sleep(1)
    if dies == "True":
        os.kill(os.getpid(), signal.SIGKILL)
processes.leave(42, together=True)
"""
    address = f"127.0.0.1:{started.free_port()}"
    first, second = (
        started.start_python("-c", script, address, str(process), str(dies))
        for process in (0, 1)
    )
    started.end(second, status=-signal.SIGKILL if dies else 42)
    started.end(first, status=42, seconds=60)
