"""Runs whose workdir, and data whose files, are in a bucket: against support/bucket_server.py."""

import json
import re
import shutil
import signal
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from bigbatch import evaluate, train
from bigbatch.data import local_copy, prepared, sources
from bigbatch.storage import bucket, checkpoint, lease, writing
from bigbatch.storage.logs import read_events, replace_text
from experiments import logs
from tests.data.test_sources import as_png, data_config, pictures, prepare
from tests.support import small_config, started
from tests.support.bucket_server import serving

# 37 updates in two phases, and a checkpoint an epoch.
SETTINGS = ("dtype=float64", "recipe.epochs=12", "recipe.falls=((10,2),)", "tensorboard=true")
BOUNDARY, END = 1632, 1920  # examples seen at the phases' ends


def start(workdir, **options):
    return started.start(workdir, *SETTINGS, **started.SMALL, **options)


def run(workdir):
    config = small_config.get_config(",".join(["resident", *SETTINGS]))
    return train.train_and_evaluate(config, workdir, show=False)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch, serving("bucket", patch) as server:
        patch.setenv("TMPDIR", str(tmp_path_factory.mktemp("mirrors")))  # a killed one leaves its
        yield server


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run in a folder."""
    folder = tmp_path_factory.mktemp("whole")
    started.end(start(folder))
    return folder


@pytest.fixture(scope="module")
def in_bucket(server):
    """The same run in a bucket, by a process of its own: its url, and all writes in order."""
    server.writes.clear()
    started.end(start("gs://bucket/run"))
    return "gs://bucket/run", list(server.writes)


def copy(server, name):
    """The run in the bucket once more, for a test to change: how its objects begin, and its url."""
    for below in server.names("bucket/run/"):
        server.put(f"bucket/{name}/{below}", server.content(f"bucket/run/{below}"))
    return f"bucket/{name}/", f"gs://bucket/{name}"


def sources_of_programs(server, beginning):
    """Of the newest start: {program: where timing.jsonl says that it came from}."""
    found = {}
    for event in map(json.loads, server.content(beginning + "timing.jsonl").splitlines()):
        if event["event"] == "start":
            found = {}
        elif event["event"] == "phase":
            found |= {name: made["from"] for name, made in event["programs"].items()}
    return found


def finished(server, beginning):
    return [name.split("/")[1] for name in server.names(beginning)
            if re.fullmatch(r"checkpoints/\d+/checksums.json", name)]


def flip_a_bit(server, beginning, position):
    """In the largest object of the state in the checkpoint at a position, whose name it returns."""
    largest = max((name for name in server.names(beginning) if f"/{position}/state/" in name),
                  key=lambda name: len(server.content(beginning + name)))
    content = bytearray(server.content(beginning + largest))
    content[len(content) // 2] ^= 16
    server.put(beginning + largest, bytes(content))
    return largest


def test_a_run_in_a_bucket_is_the_run_in_a_folder(server, whole, in_bucket):
    url, _ = in_bucket
    assert started.bits_different(url, whole) == 0
    assert server.content("bucket/run/metrics.jsonl") == (whole / "metrics.jsonl").read_bytes()
    assert finished(server, "bucket/run/") == [p.name for p in checkpoint.finished(whole)]
    names = server.names("bucket/run/")
    assert "lease.json" not in names
    newest = f"checkpoints/{END:015d}/"
    listed = json.loads(server.content(f"bucket/run/{newest}checksums.json"))["files"]
    assert {name.removeprefix(newest) for name in names if name.startswith(newest)} == {
        "checksums.json", *listed}
    board = next(name for name in names if name.startswith("tensorboard/"))
    assert b"test_accuracy" in server.content(f"bucket/run/{board}")
    last = json.loads(server.content("bucket/run/timing.jsonl").splitlines()[-1])
    assert last["event"] == "time_share", "the last lines did not come up at the end"


def test_logs_go_up_before_the_state_and_the_state_before_its_marker(in_bucket):
    _, writes = in_bucket
    told = [write.replace("bucket/run/", "") for write in writes]
    commits = [place for place, write in enumerate(told) if write.endswith("checksums.json")
               and write.startswith("put")]
    assert len(commits) > 10
    before = 0
    for commit in commits:
        name = told[commit].split("/")[1]
        since = told[before:commit]
        state = [place for place, write in enumerate(since) if f"checkpoints/{name}/" in write]
        log = since.index("put metrics.jsonl")
        assert state and log < min(state), since
        assert f"put checkpoints/{name}/run.json" in since
        before = commit + 1
    assert not any(f"checkpoints/{told[commits[-1]].split('/')[1]}/" in w for w in told[before:])
    for place, write in enumerate(told):
        if write.startswith("delete checkpoints/") and write not in told[:place]:
            name = write.split("/")[1]
            first = next(w for w in told if w.startswith(f"delete checkpoints/{name}/"))
            assert first == f"delete checkpoints/{name}/checksums.json", "the marker goes first"


def test_a_log_claims_no_more_than_the_checkpoint_it_went_up_with(server, tmp_path):
    with bucket.opened("gs://bucket/logs") as (folder, mirror), mirror.held():
        log = folder / "metrics.jsonl"
        log.write_text("one\n")
        future = writing.save(
            folder, {"a": np.arange(3.0)}, {"examples_seen": 1}, 1, set(), mirror)
        log.write_text("one\ntwo\n")
        future.result()
        assert server.content("bucket/logs/metrics.jsonl") == b"one\n"
        assert [path.name for path in (folder / "checkpoints").iterdir()] == [f"{1:015d}"]
        assert not any((folder / "checkpoints" / f"{1:015d}").iterdir()), "the state is still here"
    np.testing.assert_array_equal(checkpoint.load("gs://bucket/logs")["a"], np.arange(3.0))


def test_programs_read_a_run_in_a_bucket(in_bucket, whole, server):
    url, _ = in_bucket
    before = list(server.writes)
    assert evaluate.evaluate_run(url) == pytest.approx(evaluate.evaluate_run(whole), rel=1e-6)
    assert logs.read_run(url).events == read_events(whole / "metrics.jsonl")
    with pytest.raises(ValueError, match="gs://bucket/none has no checkpoint"):
        checkpoint.load("gs://bucket/none")
    with pytest.raises(ValueError, match="gs://bucket/none has no metrics.jsonl"):
        logs.read_run("gs://bucket/none")
    assert server.writes == before, "reading has written"


def test_of_a_state_in_the_bucket_nothing_comes_to_this_machines_disk(server, in_bucket, whole):
    like = checkpoint.load(whole)
    with bucket.opened(in_bucket[0]) as (folder, mirror):
        found = checkpoint.find_newest(folder, mirror)
        state = checkpoint.restore(found.path, like, mirror)
        assert not any(file.is_file() for file in folder.rglob("*"))
    assert jax.tree.structure(state) == jax.tree.structure(like)
    jax.tree.map(np.testing.assert_array_equal, state, checkpoint.load(in_bucket[0]))

    beginning, url = copy(server, "changed_since")
    with bucket.opened(url) as (folder, mirror):
        assert checkpoint.find_newest(folder, mirror).path == checkpoint.folder(folder, END)
        flip_a_bit(server, beginning, f"{END:015d}")
        said = f"{url}/checkpoints/{END:015d} was whole, and cannot be read: DATA_LOSS.*job again"
        with pytest.raises(ValueError, match=said):
            checkpoint.restore(checkpoint.folder(folder, END), like, mirror)


def test_killed_and_spoiled_it_goes_on_from_the_newest_whole_checkpoint_on_a_new_machine(
    server, whole, monkeypatch, tmp_path
):
    beginning, url = "bucket/killed/", "gs://bucket/killed"
    first = start(url, before=UPDATES_TAKE_TIME)
    started.wait_until(
        lambda: len(finished(server, beginning)) > 1
        and len(server.names(beginning + "programs/")) == 4, first,
        "its first checkpoints and all programs")
    monkeypatch.setattr(lease, "LOOK_SECONDS", 0.01)
    with pytest.raises(ValueError, match=f"held by another job .process {first.pid} on ") as held:
        run(url)
    assert f"the workdir {url}" in str(held.value)
    with server.lock:  # nothing more reaches the bucket
        first.kill()
        first.communicate()
    assert "lease.json" in server.names(beginning)
    before, newest = finished(server, beginning)[-2:]
    assert newest < f"{END:015d}"
    state = flip_a_bit(server, beginning, newest)
    unfinished = f"checkpoints/{END - 1:015d}"
    server.put(f"{beginning}{unfinished}/run.json", b"{}")
    evaluate_it = next(name for name in server.names(beginning) if "jit_evaluate" in name)
    program = server.content(beginning + evaluate_it)
    server.put(beginning + evaluate_it, program[:-1])

    output = started.end(started.start_python(
        "-c", "import runpy; from bigbatch.storage import lease; lease.STALE_SECONDS = 1.0;"
        "runpy.run_module('bigbatch.main', run_name='__main__')",
        *first.args[3:], f"--compilation_cache={tmp_path}",
    ))
    assert sources_of_programs(server, beginning) == {
        "update 6": "bucket", "evaluate": "compiled", "update 12": "bucket"}
    assert len(server.content(beginning + evaluate_it)) > len(program) // 2 and (
        server.content(beginning + evaluate_it) != program[:-1]), output
    assert len(list(tmp_path.glob("*.whole"))) >= 3, "the next start fetches them again"
    assert "Waiting for 1 s to see whether that job still renews its lease" in output
    assert started.bits_different(url, whole) == 0
    log = server.content(beginning + "metrics.jsonl")
    assert log == (whole / "metrics.jsonl").read_bytes()
    events = list(map(json.loads, server.content(beginning + "timing.jsonl").splitlines()))
    starts = [event["examples_seen"] for event in events if event["event"] == "start"]
    assert starts == [0, int(before)]
    notices = " ".join(event["text"] for event in events if event["event"] == "notice")
    assert f"{url}/{state} is damaged" in notices
    assert f"{url}/{unfinished} was not finished" in notices
    assert not [name for name in server.names(beginning) if name.startswith(unfinished)]
    assert checkpoint.load_run(url)[0]["examples_seen"] == END


ONE_KIND_OF_DEVICE = (
    "from jax._src import cache_key\n"
    "cache_key._hash_accelerator_config = cache_key._hash_devices\n")
# Longer than it takes to hear of a signal.
UPDATES_TAKE_TIME = (
    "import time\n"
    "from bigbatch import train\n"
    "take = train.take_update\n"
    "train.take_update = lambda *given, **named: (time.sleep(0.1), take(*given, **named))[1]\n")


def start_hosts(url, caches, before=""):
    """A job of two processes, each with a folder for compiled programs of its own.

    On a TPU all hosts know their slice by the same fingerprint, which is a part of a program's key.
    Each process on CPUs makes one of its own, so here it is replaced.
    """
    port = started.free_port()
    return [start(url, process=(index, 2), port=port, cache=cache,
                  before=ONE_KIND_OF_DEVICE + before)
            for index, cache in enumerate(caches)]


def test_two_hosts_told_to_stop_release_the_lease_and_new_hosts_go_on_at_once(
    server, whole, tmp_path
):
    url = "gs://bucket/stopped"
    server.writes.clear()
    job = start_hosts(url, [started.CACHE] * 2, UPDATES_TAKE_TIME)
    started.wait_until(
        lambda: len(finished(server, "bucket/stopped/")) > 0
        and len(server.names("bucket/stopped/programs/")) == 4, job[0],
        "its first checkpoint and all programs")
    job[1].send_signal(signal.SIGTERM)
    for process in job:
        started.end(process, status=42, seconds=60)
    assert "lease.json" not in server.names("bucket/stopped/")
    assert finished(server, "bucket/stopped/")[-1] < f"{END:015d}"
    new = [tmp_path / "0", tmp_path / "1"]
    for process in start_hosts(url, new):
        assert "Waiting" not in started.end(process)
    assert started.relative_difference(url, whole) < 1e-10
    # JAX itself writes nothing in the second process, so what is there came from the bucket.
    programs = server.names("bucket/stopped/programs/")
    needed = {f"{key}-cache" for key in programs if not key.startswith("jit_init")}
    for cache in new:
        assert needed <= {path.name for path in cache.glob("*-cache")}
    assert set(sources_of_programs(server, "bucket/stopped/").values()) == {"bucket"}
    sent = [write for write in server.writes if "/stopped/programs/" in write]
    assert len(sent) == len(set(sent)) == 4, "a program was uploaded twice"


def test_where_none_is_whole_nothing_is_deleted(server, in_bucket):
    beginning, url = copy(server, "none_whole")
    for name in finished(server, beginning):
        server.put(f"{beginning}checkpoints/{name}/run.json", b"{}")
    before = server.names(beginning)
    with pytest.raises(ValueError, match="no checkpoint is whole.*nothing was deleted") as caught:
        run(url)
    assert f"{url}/checkpoints/{END:015d}/run.json is damaged" in str(caught.value)
    assert server.names(beginning) == before


def test_a_write_that_fails_ends_the_run_with_the_last_good_checkpoint(server):
    server.refused = r"^bucket/failing/checkpoints/0+1[6-9]\d\d/"  # from BOUNDARY on
    try:
        output = started.end(start("gs://bucket/failing"), status=1)
    finally:
        server.refused = ""
    good = finished(server, "bucket/failing/")[-1]
    assert good < f"{BOUNDARY:015d}"
    said = [line for line in output.splitlines() if line.startswith("bigbatch:")]
    assert len(said) == 1 and "Traceback" not in output, output
    assert f"writing gs://bucket/failing/checkpoints/{BOUNDARY:015d} failed: access is" in said[0]
    assert f"last good checkpoint is gs://bucket/failing/checkpoints/{good})" in said[0]
    assert "lease.json" not in server.names("bucket/failing/")


# --- a lease that is lost ---------------------------------------------------------------------
@pytest.mark.parametrize("when", ["before", "while its state goes up"])
def test_a_job_that_lost_its_lease_finishes_no_checkpoint(server, monkeypatch, when):
    beginning, url = f"bucket/lost {when}/", f"gs://bucket/lost {when}"
    state = {"a": np.arange(3.0)}

    def lose(*sent):
        server.put(beginning + "lease.json", b'{"process": 7, "host": "other"}')

    with bucket.opened(url) as (folder, mirror), mirror.held():
        log = folder / "metrics.jsonl"
        log.write_text("one\n")
        writing.save(folder, state, {"examples_seen": 1}, 1, set(), mirror).result()
        log.write_text("one\ntwo\n")
        if when == "before":
            lose()
        else:
            put = mirror._files.put
            monkeypatch.setattr(mirror._files, "put", lambda *files: lose(put(*files)))
        with pytest.raises(writing.WriteError, match="process 7 on other.*took the") as lost:
            writing.save(folder, state, {"examples_seen": 2}, 1, set(), mirror).result()
        assert [path.name for path in checkpoint.finished(folder)] == [f"{1:015d}"]
    assert f"good checkpoint is {url}/checkpoints/{1:015d})" in str(lost.value)
    assert finished(server, beginning) == [f"{1:015d}"]
    assert "lease.json" in server.names(beginning)
    if when == "before":
        assert server.content(beginning + "metrics.jsonl") == b"one\n"


def test_a_config_that_is_replaced_while_a_save_is_under_way_goes_up_whole(server):
    """As after a decision: its phases are in the new one."""
    with bucket.opened("gs://bucket/decides") as (folder, mirror), mirror.held():
        replace_text(folder / "config.json", json.dumps([1]))
        for phases in ([1, 2, 3], [1, 2]):
            now = mirror.logs()
            replace_text(folder / "config.json", json.dumps(phases))
            mirror.send_logs(now)
            assert json.loads(server.content("bucket/decides/config.json")) == phases


def test_last_logs_that_cannot_be_sent_hide_no_other_end(server, capfd):
    with bucket.opened("gs://bucket/ends") as (folder, mirror), mirror.held():
        (folder / "timing.jsonl").write_text("1\n")
        with writing.sending_last_logs(folder, mirror, []):
            pass
        assert server.content("bucket/ends/timing.jsonl") == b"1\n"
        server.put("bucket/ends/lease.json", b"{}")
        (folder / "timing.jsonl").write_text("1\n2\n")
        with pytest.raises(train.Preempted), writing.sending_last_logs(folder, mirror, []):
            raise train.Preempted("told to stop")
        said = capfd.readouterr().err
        assert "writing gs://bucket/ends/timing.jsonl failed: the workdir gs" in said
        with pytest.raises(writing.WriteError, match="timing.jsonl failed.*took the lease"):
            with writing.sending_last_logs(folder, mirror, []):
                pass
    assert server.content("bucket/ends/timing.jsonl") == b"1\n"


# --- data -------------------------------------------------------------------------------------
@pytest.fixture
def data_in_bucket(server, tmp_path, monkeypatch):
    """A TFDS data set in the bucket and in a folder, and the folder copies go to."""
    prepare(tmp_path / "local", [as_png(image) for image in pictures(20)])
    for file in (tmp_path / "local").rglob("*"):
        if file.is_file():
            server.put(f"bucket/data/{file.relative_to(tmp_path / 'local')}", file.read_bytes())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "local", tmp_path / "cache/bigbatch/data/bucket/data/cifar10/3.0.2"


def test_data_in_a_bucket_is_copied_once_and_read_to_the_pixel(data_in_bucket, capfd):
    local, copies = data_in_bucket
    config = {"name": "cifar10", "test_split": "test[1:3]"}
    expected = sources.load(data_config(dir=str(local), **config))
    for array, twin in zip(
        sources.load(data_config(dir="gs://bucket/data", **config)), expected, strict=True
    ):
        np.testing.assert_array_equal(array, twin)
    assert re.search("copying 4 files, 0.000 GB, from gs://bucket/data/cifar10/3.0.2 to "
                     f"{copies}", capfd.readouterr().err)
    [shard] = copies.glob("*/cifar10-train.array_record-00000-of-00001")
    before = shard.stat().st_mtime_ns
    sources.load(data_config(dir="gs://bucket/data", **config))
    assert shard.stat().st_mtime_ns == before and "copying" not in capfd.readouterr().err
    shard.write_bytes(b"cut short")
    dataset = sources.load(data_config(dir="gs://bucket/data", **config))
    np.testing.assert_array_equal(dataset.train_images, expected.train_images)


def test_only_the_splits_that_are_read_are_copied(data_in_bucket):
    _, copies = data_in_bucket
    sources.load(data_config(
        name="cifar10", dir="gs://bucket/data", train_split="train[:15]", test_split="train[15:]"))
    [shard] = copies.glob("*/*.array_record-*")
    assert shard.name == "cifar10-train.array_record-00000-of-00001"


def test_a_data_set_written_anew_is_copied_anew_beside_the_older_copy(
    data_in_bucket, server, tmp_path, monkeypatch
):
    local, copies = data_in_bucket
    config = data_config(name="cifar10", dir="gs://bucket/data")
    shard = "cifar10-train.array_record-00000-of-00001"
    copies.mkdir(parents=True)  # as an earlier version has left it: nothing says of which state
    (copies / shard).write_bytes((local / "cifar10/3.0.2" / shard).read_bytes())
    before = prepared.tfds_records(prepared.open_tfds(config), "cifar10", "train")
    images = [record["image"] for record in before]
    prepare(tmp_path / "mended", [as_png(image) for image in pictures(20)[::-1]])
    new = {file.name: file.read_bytes() for file in (tmp_path / "mended/cifar10/3.0.2").iterdir()}
    assert len(new[shard]) == (copies / shard).stat().st_size
    said = []

    def while_another_writes(text):  # it is said what will be copied
        said.append(text)
        server.put(f"bucket/data/cifar10/3.0.2/{shard}", new[shard])

    server.put(f"bucket/data/cifar10/3.0.2/{shard}", b"0" * len(new[shard]))
    with monkeypatch.context() as patch:
        patch.setattr(local_copy, "say", while_another_writes)
        with pytest.raises(ValueError, match="was written anew while it was copied: start again"):
            prepared.open_tfds(config)
    assert f"what else is in {copies} are copies of an older state" in said[1]
    after = prepared.tfds_records(prepared.open_tfds(config), "cifar10", "train")
    assert [record["image"] for record in after] == images[::-1]
    assert [record["image"] for record in before] == images


def test_data_that_cannot_be_had_is_refused_in_one_line(data_in_bucket, monkeypatch):
    def refusal(**changes):
        with pytest.raises(ValueError) as refused:
            sources.load(data_config(**{"name": "cifar10", "dir": "gs://bucket/data"} | changes))
        return str(refused.value)

    assert "there is no bucket 'nobody'" in refusal(dir="gs://nobody/data")
    assert "names no bucket; write gs://BUCKET/PATH" in refusal(dir="gs://")
    assert "a folder of each host, or in a bucket" in refusal(dir="s3://bucket/data")
    assert "cifar10 has no split 'nix'" in refusal(train_split="nix")
    assert "cifar10 is not in gs://bucket/elsewhere" in refusal(dir="gs://bucket/elsewhere")
    with monkeypatch.context() as patch:
        usage = shutil.disk_usage("/")._replace(free=10)
        patch.setattr(shutil, "disk_usage", lambda folder: usage)
        shutil.rmtree(data_in_bucket[1])
        assert "do not fit there (0.0 GB are free): set XDG_CACHE_HOME" in refusal()
    with monkeypatch.context() as patch:
        def of_a_library(*_, **__):
            raise OSError("the mount has gone")  # as one does, with no number of the system's

        patch.setattr(Path, "mkdir", of_a_library)
        told = refusal()
        assert "the mount has gone; set XDG_CACHE_HOME" in told and "None" not in told
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "gcsfs", None)
        assert "needs the package gcsfs: pip install gcsfs" in refusal()


def test_a_workdir_that_cannot_be_used_is_refused_before_anything_is_written(server, monkeypatch):
    server.writes.clear()
    config = ConfigDict(small_config.get_config("resident"))
    for url, said in (
        ("gs://nobody/run", "gs://nobody/run cannot be used: there is no bucket 'nobody'"),
        ("gs://bucket/forbidden", "access is refused.*gcloud auth application-default login"),
        ("s3://bucket/run", "s3://bucket/run is no folder of this machine"),
        ("gs:/bucket/run", "as the text gs://BUCKET/PATH"),
    ):
        monkeypatch.setattr(server, "refused", "^bucket/forbidden")
        with pytest.raises(ValueError, match=said) as refused:
            train.train_and_evaluate(config, url, show=False)
        assert "\n" not in str(refused.value)
    assert server.writes == []


def test_what_fails_on_this_machines_disk_is_not_put_down_to_the_bucket(server):
    with bucket.opened("gs://bucket/disk") as (_, mirror), mirror.held():
        with pytest.raises(ValueError, match="No such file.*this machine's own disk. TMPDIR sets"):
            with bucket.explained(mirror.url):
                mirror.send_logs({"metrics.jsonl": 1})  # which somebody removed
    with pytest.raises(ValueError, match="No space left on device, on this machine's own disk"):
        with bucket.explained(mirror.url), open("/dev/full", "wb", buffering=0) as full:
            full.write(b"1")
