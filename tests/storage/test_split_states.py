"""Checkpoints of states split over devices and processes: written in parts, and read in others.

Restored states are compared with closed forms: every array holds 0, 1, 2, ...
"""

import json
import threading
import time

import jax
import numpy as np
import pytest

from bigbatch.mistake import Mistake
from bigbatch.storage import arrays, bucket, checkpoint, tree, writing
from tests.support import read_in_pieces, split_states, started
from tests.support.bucket_server import serving
from tests.support.split_states import check, like, made, mesh

SHORT, LONG = 1 << 10, 1 << 26  # numbers; LONG are 256 MB
MEBIBYTE = 1 << 20
# So that glibc gives the system back at once what is freed, and a peak is of what is in use.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": str(1 << 16)}


def save(folder, state, examples_seen=1, mirror=None):
    run = {"examples_seen": examples_seen}
    return writing.save(folder, state, run, 9, set(), mirror).result()


@pytest.mark.parametrize("chunk", [None, 128])
def test_a_state_split_one_way_is_restored_in_any_other(tmp_path, monkeypatch, chunk):
    if chunk:  # bytes, so that pieces are cut into many chunks, and cut anew by the readers
        monkeypatch.setattr(arrays, "CHUNK_BYTES", chunk)
        monkeypatch.setattr(arrays, "IN_FLIGHT_BYTES", 5 * chunk)
    saved = {shape: made(shape and mesh(*shape), SHORT) for shape in ((2, 4), (1, 2), None)}
    for number, state in enumerate(saved.values()):
        path = save(tmp_path, state, number)
        assert checkpoint.faults_of(path) == []
        for shape in ((4, 2), (1, 1), (1, 4), (2, 1)):
            check(checkpoint.restore(path, like(mesh(*shape), SHORT)))
        whole = checkpoint.restore(path, like(None, SHORT))
        jax.tree.map(np.testing.assert_array_equal, whole, saved[None])
        loaded = checkpoint.load(tmp_path, number)
        assert loaded["opt_state"] == [None, [{"count": 0}]] and "average" not in loaded
        jax.tree.map(np.testing.assert_array_equal, loaded["params"], saved[None].params)


def test_each_number_is_written_once_and_no_chunk_is_larger_than_it_may_be(monkeypatch):
    monkeypatch.setattr(arrays, "CHUNK_BYTES", 64)
    part = arrays.part_of(made(mesh(2, 4), SHORT))
    for name, shape in split_states.shapes(SHORT).items():
        name = "opt_state.1.0.count" if name == "count" else f"params.{name}"
        assert part.layouts[name].shape == shape
        assert 4 * np.prod(part.layouts[name].chunk) <= 64
        pieces = [piece.data for piece in part.pieces if piece.name == name]
        numbers = np.concatenate([piece.ravel() for piece in pieces])
        assert sorted(numbers.tolist()) == list(range(int(np.prod(shape))))


def test_orbax_reads_a_split_state(tmp_path):
    """It reads what this package writes; tests/storage/version_0.1 is of Orbax, and read here."""
    orbax = pytest.importorskip("orbax.checkpoint")
    path = save(tmp_path, made(mesh(2, 4), SHORT))
    read = orbax.PyTreeCheckpointer().restore(path / checkpoint.STATE)
    assert jax.tree.structure(read) == jax.tree.structure(checkpoint.load(tmp_path))
    jax.tree.map(np.testing.assert_array_equal, read, checkpoint.load(tmp_path))


@pytest.mark.parametrize("room", [False, True])
def test_a_state_whose_memory_the_next_update_takes_over_is_saved_as_it_was(tmp_path, room):
    state, begin = made(mesh(2, 4), SHORT), threading.Event()
    arrays._spare.clear()
    if room:
        writing.make_room(like(mesh(2, 4), SHORT)).result()
    update = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0,
                     out_shardings=jax.tree.map(lambda leaf: leaf.sharding, state))
    state = update(jax.tree.map(lambda leaf: leaf - 1, state))  # in memory of JAX's own
    for number in (1, 2):  # the second save copies into memory that the first has left
        copies = arrays.part_of(state).memory
        own = {copy.flags.writeable for copy in copies}  # or the memory is JAX's
        assert len(copies) == 34 and own == {room or number == 2}
        arrays._spare += [copy for copy in copies if copy.flags.writeable]
        writing._saves.submit(begin.wait)
        try:
            saving = writing.save(tmp_path, state, {"examples_seen": number}, 9, set())
            after = jax.block_until_ready(update(state))
        finally:
            begin.set()
        assert after.params["rows"][0, 0] == 1
        check(checkpoint.restore(saving.result(), like(mesh(1, 1), SHORT)))
        state = update(jax.tree.map(lambda leaf: leaf - 2, after))
        begin.clear()


def test_a_state_of_other_arrays_is_refused_in_one_line(tmp_path):
    path = save(tmp_path, made(mesh(1, 2), SHORT))
    for other, said in (
        (like(mesh(1, 2), 2 * SHORT), r"params.flat has the shape \(1024,\), and \(2048,\) is"),
        ({"params": {"absent": np.zeros(3)}}, "params.absent/zarr.json.* does not exist"),
    ):
        with pytest.raises(Mistake, match=f"{path} was whole, and cannot be read: .*{said}"):
            checkpoint.restore(path, other)


def test_two_processes_evaluate_a_run_and_begin_with_it_without_having_all_of_it(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(arrays, "CHUNK_BYTES", split_states.SMALL_CHUNK)
    read_in_pieces.save(tmp_path)
    port = started.free_port()
    job = [started.start_python("-m", "tests.support.read_in_pieces", str(tmp_path), str(port),
                                str(process), devices=4, **GIVE_BACK) for process in (0, 1)]
    for process in job:
        output = started.end(process, seconds=120)
        found = json.loads(output.split("evaluation ")[1].splitlines()[0])
        assert found["test_loss"] == pytest.approx(read_in_pieces.test_loss(), rel=1e-5)
        for what in ("evaluating", "beginning"):  # half of the array, a piece of it twice
            taken = int(output.split(f"{what} took ")[1].split(" MB")[0])
            assert 60 <= taken < 110, f"{what} took {taken} MB, and all is 128"


@pytest.mark.parametrize("where", ["folder", "bucket"])
def test_two_processes_save_one_state_and_one_of_them_is_killed(tmp_path, monkeypatch, where):
    """Restored from one process by two, from two by one; killed, it costs its own checkpoint."""
    in_bucket, long = where == "bucket", LONG if where == "folder" else 1 << 21
    with serving("bucket", monkeypatch) as server:
        workdir = "gs://bucket/run" if in_bucket else str(tmp_path / "run")
        monkeypatch.setenv("TMPDIR", str(tmp_path))
        with bucket.opened(workdir) as (folder, mirror):
            if mirror:
                mirror._lease = split_states.Held()
            monkeypatch.setattr(arrays, "CHUNK_BYTES", split_states.SMALL_CHUNK)
            save(folder, made(mesh(1, 1), long), 1, mirror)
        port = started.free_port()
        job = [started.start_python("-m", "tests.support.split_states", workdir, str(port),
                                    str(process), str(long), devices=4) for process in (0, 1)]
        job[1].communicate(timeout=120)
        killed = time.monotonic()
        output = started.end(job[0], status=42, seconds=60)
        assert time.monotonic() - killed < split_states.WAIT_SECONDS + 20
        said = [line for line in output.splitlines() if line.startswith("bigbatch: ")]
        assert len(said) == 1 and "Traceback" not in output, output
        assert f"writing {workdir}/checkpoints/{3:015d} failed: process 1 of the job has" in said[0]
        assert f"good checkpoint is {workdir}/checkpoints/{2:015d})" in said[0]
        taken = int(output.split("restoring took ")[1].split(" MB")[0])
        if not in_bucket:  # half of it is 128 MB, and a piece of 32 MB may be there twice
            assert 120 <= taken < 200, f"{taken} MB for half of {4 * LONG // MEBIBYTE}"

        def newest():
            with bucket.opened(workdir) as (folder, mirror):
                found = checkpoint.find_newest(folder, mirror)
                if found.run["examples_seen"] == 2 and not found.faults:
                    check(checkpoint.restore(found.path, like(mesh(1, 2), long), mirror))
                return found

        found = newest()
        assert found.run == {"examples_seen": 2}
        if in_bucket:
            assert [f"{3:015d} was not finished" in fault for fault in found.faults] == [True]
        at = f"checkpoints/{2:015d}"
        content = (server.content if in_bucket else lambda name: (tmp_path / name).read_bytes())
        put = (server.put if in_bucket else lambda name, new: (tmp_path / name).write_bytes(new))
        beginning = ("bucket/run/" if in_bucket else "run/") + at
        files = json.loads(content(f"{beginning}/checksums.json"))["files"]
        for process in (0, 1):
            data = max((name for name in files if f"{arrays.OF_PROCESS}{process}/d/" in name),
                       key=lambda name: len(content(f"{beginning}/{name}")))
            good = content(f"{beginning}/{data}")
            put(f"{beginning}/{data}", good[:1000] + bytes([good[1000] ^ 4]) + good[1001:])
            found = newest()
            assert found.run == {"examples_seen": 1}
            assert f"{workdir}/{at}/{data} is damaged (its checksum differs)" in found.faults
            put(f"{beginning}/{data}", good)
        assert tree.FILE in {name.rpartition("/")[2] for name in files}
