"""--profile=START:COUNT: a trace of these updates of the run, and no bit of the run's changed."""

import gzip
import json
from collections import Counter

import jax
import numpy as np
import pytest

from bigbatch import train
from bigbatch.job import statuses
from bigbatch.storage import checkpoint
from bigbatch.storage.logs import read_events
from tests.support import small_config, started
from tests.support.bucket_server import serving

UPDATES = 9  # of the run, 7 of them in its first phase


def run(workdir, profile="", **options):
    return train.train_and_evaluate(
        small_config.get_config("resident"), workdir, show=False, profile=profile, **options)


def notices(workdir):
    return [event["text"] for event in read_events(workdir / "timing.jsonl")
            if event["event"] == "notice"]


@pytest.mark.parametrize("text", ["3", "x:1", "0:3", "3:0", "1:2:3", "-1:2", "1.5:2", " 1:2"])
def test_what_is_no_span_is_refused(tmp_path, text):
    with pytest.raises(ValueError, match="--profile is .*; write START:COUNT, .* as 100:5"):
        run(tmp_path / "new", text)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("text", [f"{UPDATES + 1}:1", f"{UPDATES}:2"])
def test_what_ends_after_the_run_is_refused(tmp_path, text):
    with pytest.raises(ValueError, match=f"--profile is '{text}'.* but the run has {UPDATES}."):
        run(tmp_path / "new", text)
    assert not (tmp_path / "new").exists()


def train_apart(workdir, *flags, status=0, **environment):
    """A run in a process of its own: where libtpu was loaded before, JAX's profiler crashes."""
    job = started.start(workdir, **started.SMALL, devices=8, flags=flags, **environment)
    started.end(job, status)


def test_the_updates_are_counted_in_the_whole_run(tmp_path):
    """A run handed over after its 7th update, and traced around its 8th and 9th, over logs."""
    plain, traced = tmp_path / "plain", tmp_path / "traced"
    train_apart(plain)
    train_apart(
        traced, "--profile=8:2", "--stop_after_phase=0", status=statuses.STOPPED_AFTER_PHASE)
    assert not (traced / "profile").exists()
    train_apart(traced, "--profile=8:2")
    jax.tree.map(np.testing.assert_array_equal, checkpoint.load(traced), checkpoint.load(plain))
    assert (traced / "metrics.jsonl").read_bytes() == (plain / "metrics.jsonl").read_bytes()

    trace, = (traced / "profile").glob("plugins/profile/*/perfetto_trace.json.gz")
    assert [path.suffix for path in trace.parent.glob("*.xplane.pb")] == [".pb"]  # TensorBoard's
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    steps = [event for event in events if event.get("name") == "update"]
    assert [event["args"]["step_num"] for event in steps] == ["8", "9"]
    # An operation of the program is there once for each of 2 updates on each of 8 devices.
    times = Counter(event["name"] for event in events if event.get("name", "").startswith("end: "))
    assert Counter(times.values()).most_common(1)[0][0] == 2 * 8, times
    assert f"trace of updates 8 to 9 in {traced / 'profile'}" in notices(traced)

    train_apart(traced, "--profile=8:2")  # once more, as a job that is started again does
    assert notices(traced)[-1] == (
        "--profile: update 8 was made before this start; nothing is traced")
    assert len(list((traced / "profile/plugins/profile").iterdir())) == 1


def test_the_trace_of_a_run_in_a_bucket_is_brought_there(monkeypatch):
    with serving("bucket", monkeypatch) as server:
        train_apart("gs://bucket/run", "--profile=2:1", "--stop_after_phase=0",
                    status=statuses.STOPPED_AFTER_PHASE)
        names = server.names("bucket/run/profile/plugins/profile/")
        trace, = (name for name in names if name.endswith("perfetto_trace.json.gz"))
        content = server.content(f"bucket/run/profile/plugins/profile/{trace}")
        assert b'"step_num":"2"' in gzip.decompress(content).replace(b": ", b":")
        assert any(name.endswith(".xplane.pb") for name in names)


def test_each_process_of_a_job_traces_itself(tmp_path):
    workdir = tmp_path / "run"
    for process in started.start_job(
        workdir, **started.SMALL, processes=2, flags=("--profile=2:3",)
    ):
        started.end(process)
    for index in range(2):
        folder = workdir / "profile" / f"process-{index}"
        trace, = folder.glob("plugins/profile/*/perfetto_trace.json.gz")
        events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
        steps = [event["args"]["step_num"] for event in events if event.get("name") == "update"]
        assert steps == ["2", "3", "4"], f"of process {index}"
    assert checkpoint.find_newest(workdir).run["updates"] == UPDATES
