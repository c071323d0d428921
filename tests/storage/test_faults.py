"""What a run does when it is killed, stopped, spoiled, crowded out or in the dark."""

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from bigbatch import train
from bigbatch.mistake import Mistake
from bigbatch.programs import program_cache
from bigbatch.storage import arrays, caches, checkpoint, checksums, workdir, writing
from bigbatch.storage.logs import read_events
from tests import soak
from tests.storage.test_continuing import assert_same_bits, run, small
from tests.support import small_config, started
from tests.support.updates import with_model

# A small network, and a run that has to be caught while it lasts.
SMALL = started.SMALL
LONG = ("recipe.epochs=100000", "log_every_epochs=2", "eval_every_epochs=20")
# For the short soak: three phases, with the programs of each and as many saves as evaluations.
SOAKED = SMALL | {"config": (
    *SMALL["config"], "recipe.epochs=12", "recipe.falls=((4,2),(8,2))", "log_every_epochs=0.3",
    "eval_every_epochs=0.6", "checkpoint_every_epochs=0.6", "eval_batch_size=8",
    "keep_checkpoints=3",
)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A tiny run that nothing interrupts, and all its checkpoints."""
    folder = tmp_path_factory.mktemp("whole")
    return run(small("keep_checkpoints=9"), folder), folder


def test_a_soak_of_kills_and_spoiled_checkpoints_loses_no_bit(tmp_path):
    """The short form of `make soak`, and its record of two sittings."""
    found = soak.soak(tmp_path, kills=2, corruptions=20, seed=64, run=SOAKED)
    assert (found["kills"], found["corruptions"], found["runs"]) == (2, 20, 1)
    assert found["resumes"] > 0, found
    assert {loss: found[loss] for loss in soak.LOSSES} == dict.fromkeys(soak.LOSSES, 0)
    soak.add_to_record(tmp_path / "record.json", [{"counts": found}, {"counts": {"kills": 3}}])
    total = json.loads((tmp_path / "record.json").read_text())["total"]
    assert total == found | {"kills": 5}


def test_a_cut_cache_entry_costs_one_recompile(tmp_path):
    """JAX itself would fail to load it at every start from now on."""
    cache = tmp_path / "cache"

    def one_run(name):
        started.end(started.start(tmp_path / name, **SMALL, cache=cache))
        return {path.name: path.stat().st_mtime_ns for path in cache.glob("*-cache")}

    written = one_run("a")
    largest = max(cache.glob("*-cache"), key=lambda path: path.stat().st_size)
    content = largest.read_bytes()
    largest.write_bytes(content[: len(content) // 2])
    again = one_run("b")
    assert len(largest.read_bytes()) > len(content) // 2, "the cut entry is still there"
    changed = {name for name in written if again[name] != written[name]}
    assert changed == {largest.name}
    assert started.bits_different(tmp_path / "a", tmp_path / "b") == 0


def test_an_unusable_cache_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file/cache cannot be used.*--compilation_cache"):
        program_cache.keep(str(tmp_path / "file" / "cache"))
    with pytest.raises(ValueError, match="gs:/.*cannot be used: it is no folder of this machine"):
        program_cache.keep("gs://bucket/cache")


@pytest.fixture
def cache_of_jax(monkeypatch):
    """What JAX's cache is set to now; it is set back afterwards."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs",
             "jax_persistent_cache_min_entry_size_bytes")
    before = {name: getattr(jax.config, name) for name in names}
    for variable in ("JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    yield lambda: jax.config.jax_compilation_cache_dir
    for name, value in before.items():
        jax.config.update(name, value)


def test_training_can_do_without_a_cache_that_nobody_named(tmp_path, monkeypatch, cache_of_jax):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    line = program_cache.keep(None)
    assert "file/.cache/bigbatch cannot be used: Not a directory. They are compiled anew" in line
    assert not cache_of_jax()
    # A user without a home.
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert "~/.cache/bigbatch cannot be used: there is no such home folder." in (
        program_cache.keep(None))
    with pytest.raises(Mistake, match="~/cache cannot be used: there is no such home folder; give"):
        program_cache.keep("~/cache")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_compiled_programs_are_where_other_caches_are(tmp_path, monkeypatch, cache_of_jax):
    monkeypatch.setenv("HOME", str(tmp_path))
    for named, expected in ((str(tmp_path / "xdg"), "xdg/bigbatch"), ("", ".cache/bigbatch"),
                            ("not/absolute", ".cache/bigbatch")):
        monkeypatch.setenv("XDG_CACHE_HOME", named)
        assert program_cache.keep(None) == ""
        assert cache_of_jax() == str(tmp_path / expected)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert caches.folder("plans") == str(tmp_path / "xdg/bigbatch/plans")


def test_the_cache_that_jax_knows_is_used_and_left_to_its_others(
    tmp_path, monkeypatch, cache_of_jax
):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "shared"))
    assert program_cache.keep(None) == "" and cache_of_jax() == str(tmp_path / "shared")
    (tmp_path / "shared/of-another-cache").write_bytes(b"1")
    program_cache.keep(None)
    assert [path.name for path in (tmp_path / "shared").iterdir()] == ["of-another-cache"]
    # The flag goes first, and empty it says none.
    assert program_cache.keep(str(tmp_path / "own")) == ""
    assert cache_of_jax() == str(tmp_path / "own")
    assert program_cache.keep("") == "" and not cache_of_jax()


def test_an_entry_of_another_user_is_left_where_it_is(tmp_path, monkeypatch, cache_of_jax):
    (tmp_path / "a-cache").write_bytes(b"1")

    def forbidden(*_, **__):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "unlink", forbidden)
    assert program_cache.keep(str(tmp_path)) == "" and cache_of_jax() == str(tmp_path)
    monkeypatch.setattr(Path, "exists", forbidden)
    assert program_cache.keep(str(tmp_path)) == "" and cache_of_jax() == str(tmp_path)


# --- what a run says of itself ------------------------------------------------------------------
def test_a_stop_before_the_first_update_does_not_say_that_it_saved(tmp_path):
    process = started.start(tmp_path, **SMALL, cache=None)
    started.wait_until((tmp_path / "config.json").exists, process, "its first file")
    process.send_signal(signal.SIGTERM)
    output = started.end(process, status=42, seconds=60)
    assert "told to stop before the first update, so nothing is saved" in output
    assert checkpoint.finished(tmp_path) == []


def test_an_enormous_run_begins_at_once(tmp_path):
    """It does not look at each of its billions of updates first."""
    process = started.start(tmp_path, "recipe.epochs=1e9", **SMALL)
    started.wait_until((tmp_path / "metrics.jsonl").exists, process, "a line", seconds=45)
    process.send_signal(signal.SIGTERM)
    started.end(process, status=42, seconds=60)


def test_a_run_past_the_phase_to_stop_after_says_so(tmp_path):
    phases = ("recipe.falls=((1,2),(2,1.5))",)
    first = started.start(tmp_path, *phases, **SMALL, flags=("--stop_after_phase=1",))
    assert "stopped after phase noise/2 at example 384" in started.end(first, status=3)
    again = started.start(tmp_path, *phases, **SMALL, flags=("--stop_after_phase=0",))
    output = started.end(again, status=3)
    assert "phase noise/1 is over since example 192, so nothing was trained" in output
    assert "stopped after" not in output


# --- spoiled checkpoints ----------------------------------------------------------------------
def damage(kind: str, file: Path) -> None:
    content = bytearray(file.read_bytes())
    if kind == "missing":
        file.unlink()
    elif kind == "truncated":
        file.write_bytes(content[:-1])
    else:
        content[len(content) // 2] ^= 16
        file.write_bytes(content)


def test_any_damage_to_any_file_of_a_checkpoint_is_found_by_name(whole, tmp_path):
    shutil.copytree(whole[1] / "checkpoints", tmp_path / "checkpoints")
    newest, before, *_ = reversed(checkpoint.finished(tmp_path))
    files = [file for file in newest.rglob("*") if file.is_file()]
    assert {"run.json", "checksums.json"} < {file.name for file in files}
    assert len(files) > 6
    for file in files:
        content = file.read_bytes()
        for kind in ("missing", "truncated", "a flipped bit")[: 3 if content else 1]:
            damage(kind, file)
            found = checkpoint.find_newest(tmp_path)
            assert found.path == before, f"{kind} in {file.name}: fell back to {found.path}"
            assert any(str(file) in fault for fault in found.faults), (kind, found.faults)
            file.write_bytes(content)
    assert checkpoint.find_newest(tmp_path).path == newest


def test_training_goes_on_from_the_newest_checkpoint_that_is_whole(whole, tmp_path):
    state, folder = whole
    shutil.copytree(folder, tmp_path / "run")
    damaged = checkpoint.finished(tmp_path / "run")[-2:]
    for path, kind in zip(damaged, ("truncated", "a flipped bit"), strict=True):
        damage(kind, max(path.rglob("d/*"), key=lambda file: file.stat().st_size))
    assert_same_bits(
        run(small("keep_checkpoints=9"), tmp_path / "run"), state, "after damage")
    names = [path.name for path in checkpoint.finished(folder)]
    assert [path.name for path in checkpoint.finished(tmp_path / "run")] == names
    assert checkpoint.find_newest(tmp_path / "run").faults == []
    log = "metrics.jsonl"
    assert (tmp_path / "run" / log).read_bytes() == (folder / log).read_bytes()
    notices = [e["text"] for e in read_events(tmp_path / "run/timing.jsonl")
               if e["event"] == "notice"]
    for path in damaged:
        assert any(str(path) in text and "damaged" in text for text in notices), notices


def test_where_no_checkpoint_is_whole_nothing_is_deleted(whole, tmp_path):
    shutil.copytree(whole[1], tmp_path / "run")
    for path in checkpoint.finished(tmp_path / "run"):
        damage("a flipped bit", path / "run.json")
    before = sorted(path for path in (tmp_path / "run").rglob("*"))
    with pytest.raises(ValueError, match="no checkpoint is whole.*nothing was deleted") as caught:
        run(small("keep_checkpoints=9"), tmp_path / "run")
    for path in checkpoint.finished(whole[1]):
        assert path.name + "/run.json is damaged" in str(caught.value)
    assert sorted(path for path in (tmp_path / "run").rglob("*")) == before


def test_the_newest_and_every_phase_boundary_are_kept(tmp_path):
    config = small("keep_checkpoints=2", "checkpoint_every_epochs=0.1")
    run(config, tmp_path)
    kept = [int(path.name) for path in checkpoint.finished(tmp_path)]
    boundaries = [phase.end_example for phase in train.make_phases(config)]
    saved = [event["examples_seen"] for event in read_events(tmp_path / "timing.jsonl")
             if event["event"] == "save"]
    assert len(saved) > 10
    assert kept == sorted({*boundaries, *saved[-2:]})


def test_retention_counts_what_was_written_and_not_what_is_damaged(tmp_path):
    state = {"weight": np.arange(3.0)}

    def save(examples_seen):
        return writing.save(tmp_path, state, {"examples_seen": examples_seen}, 1, {100})

    for examples_seen in (100, 200, 300, 400):
        save(examples_seen).result()
    assert [int(path.name) for path in checkpoint.finished(tmp_path)] == [100, 400]
    damage("a flipped bit", checkpoint.finished(tmp_path)[-1] / "run.json")
    save(150).result()  # the run went on from 100
    assert int(checkpoint.find_newest(tmp_path).path.name) == 150


def test_an_earlier_checkpoint_is_loaded_by_its_position(tmp_path):
    for seen in (100, 200, 300, 400):
        writing.save(
            tmp_path, {"weight": np.full(3, seen)}, {"examples_seen": seen}, 9, set()).result()
    for seen in (100, 400):
        run, state = checkpoint.load_run(tmp_path, seen)
        assert run["examples_seen"] == seen and (state["weight"] == seen).all()
    assert (checkpoint.load(tmp_path)["weight"] == 400).all()
    for absent in (0, 150, -100):
        with pytest.raises(Mistake, match=f"no checkpoint at {absent} .* at 100, 200, 300, 400"):
            checkpoint.load(tmp_path, absent)
    damage("truncated", checkpoint.folder(tmp_path, 200) / "run.json")
    with pytest.raises(Mistake, match=r"run\.json is damaged .* is not whole"):
        checkpoint.load(tmp_path, 200)
    with pytest.raises(Mistake, match="none has no checkpoint"):
        checkpoint.load(tmp_path / "none", 200)


def test_a_relative_workdir_and_one_that_is_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(small("recipe.epochs=1.5", "tensorboard=true"), "runs/a")
    assert checkpoint.load("runs/a")["params"]
    written = b"".join(file.read_bytes() for file in (tmp_path / "runs/a/tensorboard").iterdir())
    for name in (b"test_accuracy", b"noise_scale", b"train_loss"):
        assert name in written
    with pytest.raises(ValueError, match="s3://bucket/run is no folder of this machine"):
        run(small(), "s3://bucket/run")
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


# What TensorStore, a shell, a URL or a format string may take for something else.
NAMES = ("a[1]", "a]b[", "a*b", "a?b", "a\\b", "a{b}c", "sp ace", "a#b", "a%20b", "a%b",
         "new\nline", "ümlaut日", "a:b", "a'b\"", "~x", "a$HOME", "x" * 255)


@pytest.mark.parametrize("name", NAMES)
def test_a_workdir_of_any_name_can_be_read_back(tmp_path, monkeypatch, name):
    above = tmp_path / name
    above.mkdir()
    monkeypatch.chdir(above)  # so that the name is in no path that is given
    folder = workdir.local_folder("run")
    with workdir.open_workdir(folder):
        state = {"weight": np.arange(6.0).reshape(2, 3), "more": {"bias": np.ones(4)}}
        writing.save(folder, state, {"examples_seen": 100}, 1, set()).result()
    found = checkpoint.find_newest(folder)
    assert (found.path, found.faults) == (checkpoint.folder(folder, 100), [])
    assert_same_bits(checkpoint.load("run"), state, name)
    assert_same_bits(checkpoint.restore(found.path, state), state, name)


def test_a_workdir_that_could_not_be_read_back_is_refused_before_training(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="'.*udcff/run' is not text in UTF-8.*give --workdir"):
        run(small(), os.fsdecode(os.fsencode(tmp_path) + b"/a\xff/run"))
    long = tmp_path / "/".join(["x" * 200] * 19)
    with pytest.raises(ValueError, match="path of 3.* bytes, .* at most 38.*; give a shorter"):
        run(small(), long)
    assert not (long / "checkpoints").exists()
    # A folder that takes a link, where there can be none.
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    with pytest.raises(ValueError, match=r"a\\b cannot be written: No such file or directory"):
        run(small(), tmp_path / "a\\b")


def test_a_checkpoint_whose_arrays_cannot_be_opened_is_not_whole(tmp_path, monkeypatch):
    """Its files have their checksums: so Orbax wrote them, in a folder with a pattern's letters."""
    for seen in (1, 2):
        state = {"weight": np.ones(4), "bias": np.ones(seen)}
        writing.save(tmp_path, state, {"examples_seen": seen}, 9, set()).result()
    newest = checkpoint.folder(tmp_path, 2)
    (newest / checkpoint.STATE / "manifest.ocdbt").unlink()
    (newest / checksums.FILE).unlink()
    files = checksums.of((file for file in newest.rglob("*") if file.is_file()), newest)
    (newest / checksums.FILE).write_text(checksums.listing(files))
    found = checkpoint.find_newest(tmp_path)
    assert found.path == checkpoint.folder(tmp_path, 1)
    assert f"the arrays in {newest}/state cannot be opened (NOT_FOUND" in found.faults[0]
    # Nor is one committed from which a chunk is missing.
    blocks = arrays._blocks
    monkeypatch.setattr(arrays, "_blocks", lambda part: list(blocks(part))[1:])
    with pytest.raises(writing.WriteError, match="1 of 4 chunks are missing, as weight"):
        writing.save(tmp_path, state, {"examples_seen": 3}, 9, set()).result()
    assert checkpoint.finished(tmp_path) == [found.path, newest]


# --- stopped ----------------------------------------------------------------------------------


SLOW_SAVES = """
import time
from bigbatch import command_line, main
from bigbatch.storage import workdir, writing
writing._commit = lambda *_: time.sleep(60)
command_line.run(main.main)
"""


def test_a_second_ctrl_c_waits_for_nothing(tmp_path):
    process = started.start_python(
        "-c", SLOW_SAVES, "--config=tests/support/small_config.py:resident,recipe.epochs=100000",
        f"--workdir={tmp_path}", "--compilation_cache=")
    log = tmp_path / "metrics.jsonl"
    started.wait_until(lambda: len(read_events(log)) > 1, process, "two events")
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None, "the first one waits for its save"
    process.send_signal(signal.SIGINT)
    output = started.end(process, status=128 + signal.SIGINT, seconds=10)
    assert output.rstrip().endswith("bigbatch: interrupted."), output


def test_sigterm_while_training_ends_with_a_checkpoint_and_42(tmp_path):
    log = tmp_path / "run/metrics.jsonl"
    first = started.start(tmp_path / "run", *LONG, "checkpoint_every_epochs=99999", **SMALL)
    started.wait_until(lambda: len(read_events(log)) > 20, first, "20 events")
    told = time.monotonic()
    first.send_signal(signal.SIGTERM)
    started.end(first, status=42)
    assert time.monotonic() - told < 15
    found = checkpoint.find_newest(tmp_path / "run")
    assert found.run["examples_seen"] >= read_events(log)[-1]["examples_seen"] > 0
    assert not list((tmp_path / "run/checkpoints").glob("*.unfinished"))


def test_a_run_that_was_paused_goes_on(tmp_path):
    """As with Ctrl-Z and fg, for much longer than --dead_peer_seconds: no other process waits."""
    log = tmp_path / "metrics.jsonl"
    process = started.start(tmp_path, *LONG, **SMALL, flags=("--dead_peer_seconds=1",))
    started.wait_until(lambda: len(read_events(log)) > 1, process, "two events")
    process.send_signal(signal.SIGSTOP)
    time.sleep(10)
    seen = len(read_events(log))
    process.send_signal(signal.SIGCONT)
    started.wait_until(lambda: len(read_events(log)) > seen + 20, process, "20 more")
    process.send_signal(signal.SIGTERM)
    started.end(process, status=42, seconds=30)


def test_with_nohup_a_run_outlives_its_terminal(tmp_path):
    log = tmp_path / "metrics.jsonl"
    process = started.start(tmp_path, *LONG, **SMALL, on=("nohup",))
    started.wait_until(lambda: len(read_events(log)) > 1, process, "two events")
    process.send_signal(signal.SIGHUP)
    seen = len(read_events(log))
    started.wait_until(lambda: len(read_events(log)) > seen + 20, process, "20 more")
    process.send_signal(signal.SIGUSR1)
    started.end(process, status=42, seconds=30)


def test_sigterm_while_the_first_program_is_compiled_ends_at_once(tmp_path):
    process = started.start(tmp_path / "run", "model.depth=28", cache=None)
    timing = tmp_path / "run/timing.jsonl"
    started.wait_until(lambda: len(read_events(timing)) > 0, process, "its first event")
    process.send_signal(signal.SIGTERM)
    told = time.monotonic()
    started.end(process, status=42)
    assert time.monotonic() - told < 15
    assert [event["event"] for event in read_events(timing)] == ["start", "time_share"]
    assert checkpoint.finished(tmp_path / "run") == []


# --- crowded out, read-only, full ---------------------------------------------------------------
def test_a_second_job_on_the_same_workdir_is_refused(tmp_path):
    first = started.start(tmp_path, *LONG, "recipe.falls=((99999,2),)",
                            "checkpoint_every_epochs=99999", **SMALL)
    started.wait_until((tmp_path / "timing.jsonl").exists, first, "its first event")
    output = started.end(started.start(tmp_path, **SMALL), status=2)
    assert f"held by another job (process {first.pid} on" in output
    assert len(output.strip().splitlines()) == 1, output
    first.kill()
    first.communicate()
    (tmp_path / "metrics.jsonl").unlink(missing_ok=True)  # of another config
    run(small_config.get_config("resident"), tmp_path)  # the kill has freed it


def test_a_workdir_that_cannot_be_made_is_refused_before_compiling(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ValueError, match="file/run cannot be written: Not a directory; give --workdir"
    ):
        run(small(), tmp_path / "file" / "run")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 12 MB of its own."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs to mount a file system, which only root outside most containers may")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("what", ["checkpoint", "log"])
def test_a_full_disk_is_named_with_the_last_good_checkpoint(small_disk, tmp_path, what):
    workdir = small_disk / "run"
    every = 20 if what == "checkpoint" else 99_999
    settings = (*LONG, "keep_checkpoints=1", f"checkpoint_every_epochs={every}",
                "tensorboard=true")
    with (small_disk / "filling").open("wb", buffering=0) as filling:
        process = started.start(workdir, *settings, **SMALL)
        wanted = 2 if what == "checkpoint" else 1
        started.wait_until(
            lambda: len(checkpoint.finished(workdir)) >= wanted, process, "its first checkpoints")
        with contextlib.suppress(OSError):
            while filling.write(b"x" * 4096):
                pass
    output = started.end(process, status=1)
    assert "No space left on device" in output or "ENOSPC" in output.upper(), output
    good = checkpoint.finished(workdir)[-1]
    assert f"last good checkpoint is {good}" in output
    assert str(workdir) in output.split("failed")[0]
    (small_disk / "filling").unlink()
    assert checkpoint.find_newest(workdir).path == good
    checkpoint.load(workdir)


def test_a_read_only_workdir_is_refused_before_compiling(small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(ValueError, match="cannot be written: Read-only file system"):
        run(small(), small_disk / "run")


# --- saves in the background --------------------------------------------------------------------
class Broad(nnx.Module):
    """9.4 million parameters and little to compute."""

    def __init__(self, num_classes, dtype, rngs):
        self.first = nnx.Linear(64, 3000, rngs=rngs)
        self.second = nnx.Linear(3000, 3000, rngs=rngs)
        self.head = nnx.Linear(3000, num_classes, rngs=rngs)

    def __call__(self, images, train, keys):
        hidden = nnx.relu(self.first(images.reshape(len(images), -1)))
        return self.head(nnx.relu(self.second(hidden)))


def test_a_save_blocks_the_loop_for_an_update_or_a_moment(tmp_path):
    """With 75 MB of state, whose writing takes many times longer than what the loop waits."""
    config = with_model(
        "storage.test_faults.Broad", {}, "recipe.epochs=0.5", "recipe.falls=((0.3,2),)",
        "recipe.momentum=0.5", "recipe.batch_size=96", "checkpoint_every_epochs=0.15",
        "eval_every_epochs=1")
    run(config, tmp_path)
    events = read_events(tmp_path / "timing.jsonl")
    blocked = [event["blocked_seconds"] for event in events if event["event"] == "save"]
    update = max(1 / e["updates_per_second"] for e in events if e["event"] == "speed")
    assert len(blocked) >= 4
    assert sorted(blocked)[len(blocked) // 2] <= max(0.15, update), (blocked, update)


def test_a_save_that_fails_in_the_background_is_raised(tmp_path, monkeypatch):
    """Its folder vanishes before it gets its name: nothing the loop itself would notice."""
    commit = writing._commit

    def without_its_folder(unfinished, path, run, known):
        if run["examples_seen"] > 700:
            shutil.rmtree(unfinished)
        commit(unfinished, path, run, known)

    monkeypatch.setattr(writing, "_commit", without_its_folder)
    with pytest.raises(writing.WriteError, match="the last good checkpoint is") as caught:
        run(small("checkpoint_every_epochs=0.2"), tmp_path)
    good = checkpoint.finished(tmp_path)[-1]
    assert str(good) in str(caught.value)
    json.loads((good / "run.json").read_text())
    assert checkpoint.find_newest(tmp_path).path == good


def test_what_reads_an_older_checkpoint_than_the_newest_says_so(tmp_path):
    run(small(), tmp_path)
    newest = checkpoint.finished(tmp_path)[-1]
    file = max((path for path in newest.rglob("*") if path.is_file()),
               key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.warns(UserWarning, match=f"{file.name} is damaged.*read is the checkpoint at"):
        checkpoint.load(tmp_path)
