"""Checkpoints, of which only whole ones (complete and undamaged) are used.

A checkpoint is a folder `checkpoints/<examples seen>` with `state/` (arrays, by Orbax), `run.json`
(position, config, phases) and `checksums.json`, which is written last. While it is written, the
folder's name ends in `.unfinished`; it is renamed when all files are complete.

The state is the same on all devices. So the first process writes it alone and every process reads
it on its own, and none waits for another process, which may be dead. The argument `mirror` is
None for a workdir in a local folder; see `bucket.Mirror`.
"""

import contextlib
import hashlib
import json
import logging
import math
import shutil
import threading
import warnings
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp0
from orbax.checkpoint.experimental import v1 as ocp

from bigbatch.job.devices import all_devices
from bigbatch.job.output import say
from bigbatch.mistake import Mistake
from bigbatch.storage import bucket
from bigbatch.storage.bucket import MARKER as CHECKSUMS
from bigbatch.storage.logs import replace_text
from bigbatch.storage.workdir import plain_path

UNFINISHED = ".unfinished"
# Saves may overlap, but one thread commits them, in the order in which they were started.
_commits = ThreadPoolExecutor(1, thread_name_prefix="save")
# Orbax numbers its operations by one counter of the process and looks at it several times while it
# starts one. A read in the save's thread would move the counter under a save that the loop starts,
# which then waits for ever for a signal of another number.
_one_operation = threading.Lock()
_read_back: set[Path] = set()  # workdirs of which a checkpoint was opened after it was written


class WriteError(RuntimeError):
    """A checkpoint or a log could not be written. The text names it and the last checkpoint."""


class Found(NamedTuple):
    """The newest whole checkpoint, and the faults of newer ones."""

    path: Path | None  # None: there is no checkpoint
    run: dict[str, Any]  # the content of its run.json; {} if there is no checkpoint
    faults: list[str]  # one text a damaged file or unfinished checkpoint


def folder(workdir: Path, examples_seen: int) -> Path:
    """The path of the checkpoint at `examples_seen`. Names sort in the order of positions."""
    return workdir / "checkpoints" / f"{examples_seen:015d}"


def finished(workdir: Path) -> list[Path]:
    """The paths of all finished checkpoints, oldest first. Their files are not checked."""
    names = (workdir / "checkpoints").glob("*")
    return sorted(path for path in names if path.name.isdigit() and path.is_dir())


def find_newest(workdir: Path, mirror: bucket.Mirror | None = None) -> Found:
    """Finds the newest checkpoint in which every file has the checksum it was written with.

    With a mirror, checkpoints are downloaded newest first, and only the whole one stays here.

    Raises:
        Mistake: if there are checkpoints and none is whole. Nothing is deleted then.
    """
    unfinished = mirror.list_checkpoints() if mirror else []
    faults = []
    for path in reversed(finished(workdir)):
        if mirror:
            mirror.fetch(path)
        wrong = faults_of(path)
        if not wrong:
            return Found(path, _run_of(path), unfinished + faults)
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
    """The faults of the files of the checkpoint `path`, one text a file; [] if it is whole."""
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
    if not faults and (wrong := _why_not_open(path)):
        faults.append(f"the arrays in {path / 'state'} cannot be opened ({wrong})")
    return faults


def _why_not_open(path: Path) -> str:
    """Why the smallest array of the checkpoint `path` cannot be read; "" if it can.

    Checksums say only that the files are as they were written. Orbax may have written them so that
    nothing finds the arrays, and has then said so in a warning and gone on.
    """
    logging.disable(logging.CRITICAL)  # Orbax reports at length what is told here in one line
    try:
        leaves, tree = jax.tree.flatten(_shapes(path))
        if leaves:
            smallest = min(leaves, key=lambda array: math.prod(array.shape))
            chosen = [leaf if leaf is smallest else ocp.PLACEHOLDER for leaf in leaves]
            _read(path, jax.tree.unflatten(tree, chosen))
        elif (path / "state").is_dir() and any((path / "state").rglob("d/*")):
            return "there is none, but there are files of arrays"
    except Exception as error:  # whatever Orbax and TensorStore raise
        return " ".join(f"{type(error).__name__}: {error}".split())[:160]
    finally:
        logging.disable(logging.NOTSET)
    return ""


def restore(path: Path, like: Any, mirror: bucket.Mirror | None = None) -> Any:
    """Reads the state of a checkpoint that the first process has found whole.

    Args:
        path: of the checkpoint.
        like: a tree of arrays, or of their shapes and types, that the saved state has too.
        mirror: see above.

    Returns:
        The state, as NumPy arrays in the same tree; a field that is None stays None.

    Raises:
        Mistake: if this process cannot see the checkpoint, or its download is damaged.
    """
    if not (path / CHECKSUMS).exists():  # another process has found the checkpoint
        if not mirror:
            raise Mistake(
                f"the job's first process sees {path}, and this one does not: --workdir must be a "
                "folder that all hosts share, such as a network disk, or gs://BUCKET/PATH."
            )
        mirror.fetch(path)
        if wrong := faults_of(path):
            raise Mistake(mirror.named("; ".join(wrong)) + ": start the job again.")
    wanted = jax.tree.map(lambda array: np.empty(array.shape, array.dtype), _fields(like))
    state = _read(path, wanted)
    if mirror:
        mirror.empty(path)
    return like._replace(**state) if hasattr(like, "_asdict") else state


def load(workdir: str | Path, examples_seen: int | None = None) -> dict[str, Any]:
    """The state in a checkpoint of a run, for use outside of training.

    Args:
        workdir: a folder, or gs://bucket/path.
        examples_seen: the checkpoint's position; None for the newest whole checkpoint.

    Returns:
        `params`, `batch_stats` and `opt_state`, as nested dicts of NumPy arrays. Of a run whose
        `config.ema` is not 0 also `average`, with the averaged `params` and `batch_stats`.

    Raises:
        Mistake: if there is no such checkpoint, or it is not whole.
    """
    return load_run(workdir, examples_seen)[1]


def load_run(
    workdir: str | Path, examples_seen: int | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A checkpoint of a run: the content of its run.json, and what `load` returns.

    Args:
        workdir: a folder, or gs://bucket/path.
        examples_seen: see `load`.

    Raises:
        Mistake: see `load`.
    """
    all_devices()  # or Orbax, which asks for them, would take the arrays for damaged
    with bucket.opened(workdir) as (local, mirror):
        if examples_seen is None:
            found = find_newest(local, mirror)
        else:
            found = find_at(local, examples_seen, mirror)
        if found.path is None:
            raise Mistake(
                f"{workdir} has no checkpoint: no run was made there, or it has saved none yet.")
        for fault in found.faults:  # so an older checkpoint is read than the newest
            warnings.warn(f"{fault}; read is the checkpoint at {found.run['examples_seen']}",
                          stacklevel=3)
        return found.run, _read(found.path, _shapes(found.path))


def find_at(workdir: Path, examples_seen: int, mirror: bucket.Mirror | None) -> Found:
    """The checkpoint at a position, if it is whole; its path is None if there is none at all.

    Raises:
        Mistake: if there are only others, or it is not whole.
    """
    if mirror:
        mirror.list_checkpoints()
    positions = [int(path.name) for path in finished(workdir)]
    if not positions:
        return Found(None, {}, [])
    where = mirror.url if mirror else workdir
    if examples_seen not in positions:
        raise Mistake(
            f"{where} has no checkpoint at {examples_seen!r} examples seen; those that it has are "
            f"at {', '.join(map(str, positions))}."
        )
    path = folder(workdir, examples_seen)
    if mirror:
        mirror.fetch(path)
    if wrong := "; ".join(faults_of(path)):
        raise Mistake(f"{mirror.named(wrong) if mirror else wrong}: this checkpoint is not whole.")
    return Found(path, _run_of(path), [])


def _run_of(path: Path) -> dict[str, Any]:
    return json.loads((path / "run.json").read_text(encoding="utf-8"))


def save(
    workdir: Path, state: Any, run: Mapping[str, Any], keep: int, boundaries: set[int],
    mirror: bucket.Mirror | None = None,
) -> Future:
    """Copies `state` and starts to write a checkpoint of it in the background.

    Only the first process writes. On the others the future has its result at once.

    Args:
        workdir: the local folder of the run.
        state: a tree of arrays, the same on every device. If it is a named tuple, a field that is
            None is not in the checkpoint.
        run: the content of run.json; its `examples_seen` is the checkpoint's name.
        keep: how many of the newest checkpoints are kept when this one is committed.
        boundaries: positions (examples seen) whose checkpoints are kept besides.
        mirror: uploads the checkpoint, and the logs as they are at this call.

    Returns:
        A future of the checkpoint's path, which is done when the checkpoint is committed.

    Raises:
        WriteError: from this call or from the future, if the checkpoint could not be written.
    """
    path = folder(workdir, run["examples_seen"])
    if jax.process_index() != 0:
        done: Future = Future()
        done.set_result(path)
        return done
    unfinished = path.with_name(path.name + UNFINISHED)
    link = contextlib.ExitStack()
    try:
        logs = mirror.logs() if mirror else {}
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        writing = _start_writing(link.enter_context(plain_path(unfinished)) / "state", state)
    except Exception as error:
        link.close()
        raise write_error(path, workdir, error, mirror) from error

    def commit() -> Path:
        try:
            with link:
                writing.wait_until_finished()
            if workdir not in _read_back:  # what goes for one checkpoint goes for the others
                if wrong := _why_not_open(unfinished):
                    raise OSError(f"its arrays cannot be opened again ({wrong})")
                _read_back.add(workdir)
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


def _fields(state: Any) -> Any:
    """A named tuple's fields that are not None, by the names that they have in a checkpoint.

    Orbax would write down that a field is None, and then miss it in older checkpoints.
    """
    if not hasattr(state, "_asdict"):
        return state
    return {name: field for name, field in state._asdict().items() if field is not None}


def _options() -> ocp0.options.MultiprocessingOptions:
    """Options that make Orbax write as if this were the only process."""
    me = jax.process_index()
    return ocp0.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=str(me))


@contextlib.contextmanager
def _single_process_reading() -> Iterator[None]:
    """Makes Orbax read as if this were the only process."""
    context, options = ocp.Context(), _options()
    context.multiprocessing.primary_host = options.primary_host
    context.multiprocessing.active_processes = options.active_processes
    context.multiprocessing.barrier_sync_key_prefix = options.barrier_sync_key_prefix
    with _one_operation, context:
        yield


def _start_writing(path: Path, state: Any) -> ocp0.AsyncCheckpointer:
    """Copies `state` and starts to write it with Orbax's v0, in the format that its v1 reads.

    Orbax's v1 cannot write from one process of several: whatever its options are, it compares the
    path on all processes by a reduction over their devices.
    """
    on_one_device = jax.tree.map(_on_one_device, _fields(state))
    for array in jax.tree.leaves(on_one_device):
        if isinstance(array, jax.Array):
            array.copy_to_host_async()  # so that the copies below overlap
    options = _options()
    writer = ocp0.AsyncCheckpointer(
        ocp0.CompositeCheckpointHandler(
            state=ocp0.PyTreeCheckpointHandler(multiprocessing_options=options),
            composite_options=ocp0.CompositeOptions(multiprocessing_options=options),
        ),
        multiprocessing_options=options,
    )
    arrays = jax.tree.map(np.asarray, on_one_device)
    with _one_operation:
        writer.save(path, args=ocp0.args.Composite(state=ocp0.args.PyTreeSave(arrays)))
    return writer


def _on_one_device(array: Any) -> Any:
    return array.addressable_data(0) if isinstance(array, jax.Array) else array


def _read(path: Path, like: Any) -> Any:
    """The arrays of the checkpoint `path`, in the tree, types and shapes of `like`."""
    with _single_process_reading(), plain_path(path) as plain:
        return ocp.load(plain / "state", like)


def _shapes(path: Path) -> Any:
    """Empty NumPy arrays in the tree, types and shapes of the checkpoint `path`.

    With them Orbax reads NumPy arrays: by default it puts arrays on the devices they were saved
    from.
    """
    with _single_process_reading(), plain_path(path) as plain:
        arrays = ocp.metadata(plain / "state").metadata
    return jax.tree.map(lambda array: np.empty(array.shape, array.dtype), arrays)


@contextlib.contextmanager
def names_what_fails(
    workdir: Path, mirror: bucket.Mirror | None = None, name: str = ""
) -> Iterator[None]:
    """Turns an OSError in the block, which writes `name` in `workdir`, into a WriteError."""
    try:
        yield
    except OSError as error:
        path = Path(error.filename or workdir / name)
        raise write_error(path, workdir, error, mirror) from error


def write_error(
    path: Path, workdir: Path, error: Exception, mirror: bucket.Mirror | None = None
) -> WriteError:
    """The error to raise if `path`, a checkpoint or a log in `workdir`, could not be written."""
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
    """Uploads the logs once more at the end of the block.

    After an error in the block, waits for `saves` and then uploads too, except after a failed write
    (a WriteError) or a second Ctrl-C, which must end the process at once.

    Raises:
        WriteError: if the upload fails. After an error in the block this error is raised instead,
            and the failure is only printed.
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
            say(f"bigbatch: {failed(error)}")
        raise
    try:
        mirror.send_logs(mirror.logs())
    except Exception as error:
        raise failed(error) from error


def _commit(unfinished: Path, path: Path, run: Mapping[str, Any]) -> None:
    """Adds run.json and checksums.json to a checkpoint and gives it its final name, `path`."""
    replace_text(unfinished / "run.json", json.dumps(run, indent=1) + "\n")
    files = {
        str(file.relative_to(unfinished)): _digest(file)
        for file in sorted(unfinished.rglob("*")) if file.is_file()
    }
    replace_text(unfinished / CHECKSUMS, _listing(files))
    shutil.rmtree(path, ignore_errors=True)  # a damaged checkpoint of the same position
    unfinished.rename(path)


def _delete_old(newest: Path, keep: int, boundaries: set[int]) -> None:
    """Deletes checkpoints except the last `keep` up to `newest` and those at `boundaries`.

    Checkpoints after `newest` are damaged, and are replaced when the run comes to their positions.
    """
    written = [path for path in finished(newest.parents[1]) if path <= newest]
    for path in written[:-keep]:
        if int(path.name) not in boundaries:
            shutil.rmtree(path)


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _listing(files: Mapping[str, str]) -> str:
    """The text of checksums.json for {file: SHA-256}, with a checksum of the list itself."""
    own = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    return json.dumps({"files": files, "of_this_list": own}, indent=1) + "\n"
