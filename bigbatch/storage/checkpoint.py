"""Checkpoints that are whole or not used: Orbax's arrays, what they belong to, and checksums.

A checkpoint is a folder `checkpoints/<examples seen>` with `state/` (Orbax), `run.json` (position,
config, phase table) and, written last, `checksums.json`. It takes its name only when all
of it is there; until then the folder ends in `.unfinished`.

The state is the same on all devices. So the first process writes it alone and each reads it for
itself, and no process waits here for another that may be dead. Functions that take a `mirror` work
on a folder that stands for one in a bucket, where there is one.
"""

import contextlib
import hashlib
import json
import shutil
import sys
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp0
from orbax.checkpoint.experimental import v1 as ocp

from bigbatch.mistake import Mistake
from bigbatch.storage import bucket
from bigbatch.storage.bucket import MARKER as CHECKSUMS
from bigbatch.storage.logs import replace_text

UNFINISHED = ".unfinished"
# Saves overlap, but are committed one by one, in the order in which they were asked for.
_commits = ThreadPoolExecutor(1, thread_name_prefix="save")


class WriteError(RuntimeError):
    """A checkpoint or a log could not be written; names it and the last good checkpoint."""


class Found(NamedTuple):
    """The newest whole checkpoint, and what is wrong with newer ones."""

    path: Path | None
    run: dict[str, Any]  # run.json; {} without a checkpoint
    faults: list[str]


def folder(workdir: Path, examples_seen: int) -> Path:
    """Where the checkpoint at `examples_seen` lies; names sort by position."""
    return workdir / "checkpoints" / f"{examples_seen:015d}"


def finished(workdir: Path) -> list[Path]:
    """The checkpoints that got their name, oldest first, whole or not."""
    names = (workdir / "checkpoints").glob("*")
    return sorted(path for path in names if path.name.isdigit() and path.is_dir())


def find_newest(workdir: Path, mirror: bucket.Mirror | None = None) -> Found:
    """The newest checkpoint whose every file has the checksum it was written with.

    Of a mirror it is brought down, and nothing else left here.

    Raises:
        Mistake: if there are checkpoints and none is whole. Nothing is deleted.
    """
    unfinished = mirror.list_checkpoints() if mirror else []
    faults = []
    for path in reversed(finished(workdir)):
        if mirror:
            mirror.fetch(path)
        wrong = faults_of(path)
        if not wrong:
            run = json.loads((path / "run.json").read_text(encoding="utf-8"))
            return Found(path, run, unfinished + faults)
        if mirror:
            mirror.empty(path)
            wrong = list(map(mirror.named, wrong))
        faults += wrong
    if faults:
        raise Mistake(
            "no checkpoint is whole, so the run cannot continue (nothing was deleted; restore a "
            "copy, or start anew in another workdir): " + "; ".join(faults)
        )
    return Found(None, {}, unfinished)


def faults_of(path: Path) -> list[str]:
    """What is wrong with a checkpoint's files, one text a file; empty for a whole one."""
    try:
        listed = (path / CHECKSUMS).read_text(encoding="utf-8")
        files = json.loads(listed)["files"]
        if listed != _listing(files):
            raise ValueError
    except FileNotFoundError:
        return [f"{path / CHECKSUMS} is missing"]
    except (ValueError, KeyError, TypeError):
        return [f"{path / CHECKSUMS} is damaged"]
    faults = []
    for name, digest in files.items():
        file = path / name
        if not file.is_file():
            faults.append(f"{file} is missing")
            continue
        try:
            if _digest(file) != digest:
                faults.append(f"{file} is damaged (its checksum differs)")
        except OSError as error:
            faults.append(f"{file} cannot be read: {error.strerror}")
    return faults


def restore(path: Path, like: Any, mirror: bucket.Mirror | None = None) -> Any:
    """The state saved in `path`, as NumPy arrays in the tree of `like` (arrays or their shapes).

    Raises:
        Mistake: if a checkpoint that was just found whole is not so for this process.
    """
    if not (path / CHECKSUMS).exists():  # it was another process that found it
        if not mirror:
            raise Mistake(
                f"the job's first process has {path}, and this one has not: --workdir must be a "
                "folder that all hosts share, such as a network disk, or gs://BUCKET/PATH."
            )
        mirror.fetch(path)
        if wrong := faults_of(path):
            raise Mistake(mirror.named("; ".join(wrong)) + ": start the job again.")
    state = _read(path, jax.tree.map(lambda array: np.empty(array.shape, array.dtype), like))
    if mirror:
        mirror.empty(path)
    return state


def load(workdir: str | Path) -> dict[str, Any]:
    """What the newest whole checkpoint of a run holds, for use outside of it.

    Args:
        workdir: a folder, or gs://bucket/path.

    Returns:
        `params`, `batch_stats` and `opt_state`, as nested dicts of NumPy arrays.

    Raises:
        Mistake: if there is none.
    """
    return load_newest(workdir)[1]


def load_newest(workdir: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The newest whole checkpoint of a run: its run.json, and its arrays as `load` gives them.

    Raises:
        Mistake: if there is none.
    """
    with bucket.opened(workdir) as (local, mirror):
        found = find_newest(local, mirror)
        if found.path is None:
            raise Mistake(f"{workdir} has no checkpoint: no run was made there, or not so far.")
        with _alone():
            arrays = ocp.metadata(found.path / "state").metadata
        # Named, or Orbax would lay them out on the devices they were saved from.
        return found.run, _read(
            found.path, jax.tree.map(lambda array: np.empty(array.shape, array.dtype), arrays))


def save(
    workdir: Path, state: Any, run: Mapping[str, Any], keep: int, boundaries: set[int],
    mirror: bucket.Mirror | None = None,
) -> Future:
    """Starts saving `state`; returns once it is copied, and a future that ends with the commit.

    Only the first process writes; on the others nothing is left to do.

    Args:
        workdir: of the run.
        state: a tree of arrays, the same on every device.
        run: what goes into run.json; `examples_seen` names the checkpoint.
        keep: so many of the newest stay when the new one is committed.
        boundaries: positions (examples seen) whose checkpoints stay too.
        mirror: of the bucket that everything goes to, with the logs as they are now.

    Raises:
        WriteError: from the future as well as from here.
    """
    path = folder(workdir, run["examples_seen"])
    if jax.process_index() != 0:
        done: Future = Future()
        done.set_result(path)
        return done
    unfinished = path.with_name(path.name + UNFINISHED)
    try:
        logs = mirror.logs() if mirror else {}
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        writing = _start_writing(unfinished / "state", state)
    except Exception as error:
        raise write_error(path, workdir, error, mirror) from error

    def commit() -> Path:
        try:
            writing.wait_until_finished()
            _commit(unfinished, path, run)
            if mirror:
                mirror.send(path, logs)
            _delete_old(path, keep, boundaries)
            if mirror:
                mirror.tidy(path)
        except Exception as error:
            raise write_error(path, workdir, error, mirror) from error
        finally:
            writing.close()
        return path

    return _commits.submit(commit)


def _options() -> ocp0.options.MultiprocessingOptions:
    """What tells Orbax that this process is the only one there is."""
    me = jax.process_index()
    return ocp0.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=str(me))


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """The same for reading."""
    context, options = ocp.Context(), _options()
    context.multiprocessing.primary_host = options.primary_host
    context.multiprocessing.active_processes = options.active_processes
    context.multiprocessing.barrier_sync_key_prefix = options.barrier_sync_key_prefix
    with context:
        yield


def _start_writing(path: Path, state: Any) -> ocp0.AsyncCheckpointer:
    """Copies `state` and starts writing it; in the format that Orbax's v1 reads.

    Its v1 itself cannot write from one process of several: whatever its options say, it compares
    the path on all of them by a reduction over their devices.
    """
    mine = jax.tree.map(_on_one_device, state)
    for array in jax.tree.leaves(mine):
        if isinstance(array, jax.Array):
            array.copy_to_host_async()  # all at once, not one after another below
    options = _options()
    writer = ocp0.AsyncCheckpointer(
        ocp0.CompositeCheckpointHandler(
            state=ocp0.PyTreeCheckpointHandler(multiprocessing_options=options),
            composite_options=ocp0.CompositeOptions(multiprocessing_options=options),
        ),
        multiprocessing_options=options,
    )
    arrays = jax.tree.map(np.asarray, mine)
    writer.save(path, args=ocp0.args.Composite(state=ocp0.args.PyTreeSave(arrays)))
    return writer


def _on_one_device(array: Any) -> Any:
    return array.addressable_data(0) if isinstance(array, jax.Array) else array


def _read(path: Path, like: Any) -> Any:
    """The arrays of the checkpoint `path`, as `like` has them."""
    with _alone():
        return ocp.load(path / "state", like)


@contextlib.contextmanager
def names_what_fails(
    workdir: Path, mirror: bucket.Mirror | None = None, name: str = ""
) -> Iterator[None]:
    """Makes an OSError inside, on writing `name` in `workdir`, a WriteError."""
    try:
        yield
    except OSError as error:
        path = Path(error.filename or workdir / name)
        raise write_error(path, workdir, error, mirror) from error


def write_error(
    path: Path, workdir: Path, error: Exception, mirror: bucket.Mirror | None = None
) -> WriteError:
    """What to raise when `path`, a checkpoint or a log in `workdir`, could not be written."""
    good = [str(other) for other in finished(workdir) if other != path]
    text = (
        f"writing {path} failed: {bucket.reason(mirror.url, error) if mirror else error} (the last "
        f"good checkpoint is {good[-1] if good else 'none: the run has saved no other'})"
    )
    return WriteError(mirror.named(text) if mirror else text)


@contextlib.contextmanager
def sending_last_logs(
    workdir: Path, mirror: bucket.Mirror, saves: Collection[Future]
) -> Iterator[None]:
    """At the end of the block, waits for `saves` and brings the logs up once more.

    Also where an error ends it; but not after a write that failed, or a Ctrl-C, which waits for
    nothing.

    Raises:
        WriteError: if that fails. Where the block ends with an error, that one stays, and the
            failure is a line.
    """
    def failed(error: Exception) -> WriteError:
        return write_error(workdir / "timing.jsonl", workdir, error, mirror)

    try:
        yield
    except WriteError:
        wait(saves)
        raise
    except Exception:
        wait(saves)
        try:
            mirror.send_logs(mirror.logs())
        except Exception as error:
            print(f"bigbatch: {failed(error)}", file=sys.stderr)
        raise
    try:
        mirror.send_logs(mirror.logs())
    except Exception as error:
        raise failed(error) from error


def _commit(unfinished: Path, path: Path, run: Mapping[str, Any]) -> None:
    replace_text(unfinished / "run.json", json.dumps(run, indent=1) + "\n")
    files = {
        str(file.relative_to(unfinished)): _digest(file)
        for file in sorted(unfinished.rglob("*")) if file.is_file()
    }
    replace_text(unfinished / CHECKSUMS, _listing(files))
    shutil.rmtree(path, ignore_errors=True)  # one found damaged, whose stretch was run again
    unfinished.rename(path)


def _delete_old(newest: Path, keep: int, boundaries: set[int]) -> None:
    """Leaves `keep` up to the one just written: what is further is damaged, or of no use now."""
    written = [path for path in finished(newest.parents[1]) if path <= newest]
    for path in written[:-keep]:
        if int(path.name) not in boundaries:
            shutil.rmtree(path)


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _listing(files: Mapping[str, str]) -> str:
    """The text of checksums.json, which vouches for itself too."""
    own = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    return json.dumps({"files": files, "of_this_list": own}, indent=1) + "\n"
