"""Checkpoints, of which only whole ones (complete and undamaged) are used.

A checkpoint is a folder `checkpoints/<examples seen>` with `state/` (arrays, see `arrays.py`),
`run.json` (position, config, phases) and `checksums.json`, which is written last. While it is
written, the folder's name ends in `.unfinished`; it is renamed when all files are complete.

Each process writes the pieces of the state that it owns: the first one everything that all devices
have. It alone adds the other files and waits for the others' parts, in the background; the others
wait for nobody. The argument `mirror` is None for a workdir in a local folder; see `bucket.Mirror`.
"""

import contextlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import jax

from bigbatch.job import processes
from bigbatch.job.output import say
from bigbatch.mistake import Mistake
from bigbatch.storage import arrays, bucket, checksums, parts, tree
from bigbatch.storage.logs import replace_text

UNFINISHED = ".unfinished"
STATE = Path("state/state")  # where the arrays are in a checkpoint: as Orbax has them
NETWORKS = ("params", "batch_stats", "average")  # the fields of a state that networks are made of
# Saves may overlap, but one thread writes them, in the order in which they were started.
_saves = ThreadPoolExecutor(1, thread_name_prefix="save")


class WriteError(RuntimeError):
    """A checkpoint or a log could not be written. The text names it and the last checkpoint."""


class ProcessLost(WriteError):
    """A checkpoint could not be written, because another process of the job was lost."""


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


def find_newest(
    workdir: Path, mirror: bucket.Mirror | None = None, in_job: bool = False
) -> Found:
    """Finds the newest checkpoint in which every file has the checksum it was written with.

    Args:
        workdir: the local folder.
        mirror: see above.
        in_job: whether all processes of the job make this call. Then each looks at a share of the
            files, and all find the same.

    Raises:
        Mistake: if there are checkpoints and none is whole; nothing is deleted then. In a job also
            if a process does not see a checkpoint that the first one sees.
    """
    def look() -> list[list[str]]:
        unfinished = mirror.list_checkpoints() if mirror else []
        return [unfinished, [path.name for path in finished(workdir)]]

    unfinished, names = processes.decided_by_first("checkpoints", look) if in_job else look()
    faults = []
    for name in reversed(names):
        path = workdir / "checkpoints" / name
        wrong = _faults_by_all(path, mirror) if in_job else faults_of(path, mirror)
        if not wrong:
            return Found(path, _run_of(path, mirror), unfinished + faults)
        faults += wrong
    if faults:
        raise Mistake(
            "no checkpoint is whole, so the run cannot continue (nothing was deleted; restore a "
            "copy, or start anew in another workdir): " + "; ".join(faults)
        )
    return Found(None, {}, unfinished)


def _faults_by_all(path: Path, mirror: bucket.Mirror | None) -> list[str]:
    """What `faults_of` finds, by all processes of the job together."""
    def in_my_share() -> list[str]:
        if not mirror and not path.is_dir():
            raise Mistake(
                f"the job's first process sees {path}, and process {jax.process_index()} does not: "
                "--workdir must be a folder that all hosts share, such as a network disk, or "
                "gs://BUCKET/PATH."
            )
        return faults_of(path, mirror, (jax.process_index(), jax.process_count()))

    return sum(processes.gathered("faults", in_my_share), [])


def faults_of(
    path: Path, mirror: bucket.Mirror | None = None, share: tuple[int, int] = (0, 1)
) -> list[str]:
    """The faults of the files of the checkpoint `path`, one text a file; [] if it is whole.

    Args:
        path: of the checkpoint.
        mirror: see above.
        share: see `checksums.faults`.
    """
    if not mirror:
        faults = checksums.faults(path, share=share)
    else:
        faults = checksums.faults(path, mirror.read, mirror.digest, share)
    # Checksums say only that the files are as they were written, and not that arrays are in them.
    if not faults and share[0] == 0:
        try:
            _shapes(path, mirror)
        except (OSError, ValueError) as error:
            faults = [f"the arrays in {path / 'state'} cannot be opened ({_in_short(error)})"]
    return list(map(mirror.named, faults)) if mirror else faults


def restore(path: Path, like: Any, mirror: bucket.Mirror | None = None) -> Any:
    """Reads the state of a checkpoint that was found whole: of it what this process's devices hold.

    Args:
        path: of the checkpoint.
        like: a tree of arrays, or of their shapes and types, that the saved state has too.
        mirror: see above.

    Returns:
        The state in the same tree: with a sharding of `like` a jax.Array, without one a NumPy
        array. A field that is None stays None.

    Raises:
        Mistake: if the state cannot be read, or is another one.
    """
    try:
        place, _ = _opened(path, mirror)
        return tree.with_arrays(like, arrays.read(place, tree.arrays_of(like)))
    except (OSError, ValueError) as error:
        if isinstance(error, Mistake):
            raise
        where = mirror.named(str(path)) if mirror else path
        raise Mistake(
            f"{where} was whole, and cannot be read: {_in_short(error)}. Start the job again."
        ) from error


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
    workdir: str | Path, examples_seen: int | None = None, fields: Collection[str] = ()
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A checkpoint of a run: the content of its run.json, and what `load` returns.

    Args:
        workdir: a folder, or gs://bucket/path.
        examples_seen: see `load`.
        fields: which of them are read, such as `NETWORKS`; () for all.

    Raises:
        Mistake: see `load`.
    """
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
        try:
            place, names = _opened(found.path, mirror)
            names = {key: names[key] for key in names if not fields or key in fields}
            read = arrays.read(place, arrays.shapes(place, jax.tree.leaves(names)))
        except (OSError, ValueError) as error:
            raise Mistake(f"{found.path} cannot be read: {_in_short(error)}.") from error
        return found.run, jax.tree.map(read.__getitem__, names)


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
    if wrong := "; ".join(faults_of(path, mirror)):
        raise Mistake(f"{wrong}: this checkpoint is not whole.")
    return Found(path, _run_of(path, mirror), [])


def _run_of(path: Path, mirror: bucket.Mirror | None) -> dict[str, Any]:
    return json.loads(_content(path / "run.json", mirror))


def _content(file: Path, mirror: bucket.Mirror | None) -> str:
    return (mirror.read(file) if mirror else file.read_bytes()).decode()


def _opened(path: Path, mirror: bucket.Mirror | None) -> tuple[arrays.Place, Any]:
    """Where the arrays of the checkpoint `path` are, and the state's tree with their names."""
    text = _content(path / STATE / tree.FILE, mirror)
    where = mirror.place(path / STATE) if mirror else path / STATE
    return arrays.Place(where, tree.uses_zarr3(text)), tree.read(text)


def _shapes(path: Path, mirror: bucket.Mirror | None) -> dict[str, jax.ShapeDtypeStruct]:
    place, names = _opened(path, mirror)
    return arrays.shapes(place, jax.tree.leaves(names))


def save(
    workdir: Path, state: Any, run: Mapping[str, Any], keep: int, boundaries: set[int],
    mirror: bucket.Mirror | None = None,
) -> Future:
    """Copies `state` and starts to write a checkpoint of it in the background.

    All processes of a job call this. On one that owns no piece of the state the future has its
    result at once, and on another that is not the first as soon as it has written its part.

    Args:
        workdir: the local folder of the run.
        state: a tree of arrays with any sharding. If it is a named tuple, a field that is None is
            not in the checkpoint.
        run: the content of run.json; its `examples_seen` is the checkpoint's name.
        keep: how many of the newest checkpoints are kept when this one is committed.
        boundaries: positions (examples seen) whose checkpoints are kept besides.
        mirror: uploads the checkpoint, and the logs as they are at this call.

    Returns:
        A future of the checkpoint's path.

    Raises:
        WriteError: from this call or from the future, if the checkpoint could not be written.
    """
    path, first = folder(workdir, run["examples_seen"]), jax.process_index() == 0
    save, described, part = parts.next_save(), tree.written(state), arrays.part_of(state)
    if jax.process_index() not in part.owners:
        done: Future = Future()
        done.set_result(path)
        return done
    with names_what_fails(workdir, mirror):
        logs = mirror.logs() if mirror and first else {}
    unfinished = path.with_name(path.name + UNFINISHED)

    def write_mine() -> Path:
        try:
            files = _write_part(unfinished, part)
            if mirror:
                mirror.send_part(unfinished, path)
        except Exception as error:
            parts.tell(save, None, _in_short(error))
            raise write_error(path, workdir, error, mirror) from error
        parts.tell(save, files)
        return path

    def write_all() -> Path:
        try:
            _clear(unfinished, part.owners[1:])
            files = _write_part(unfinished, part)
            others = parts.gather(save, part.owners[1:])
            _add_parts(unfinished, path, part, others, mirror)
            replace_text(unfinished / STATE / tree.FILE, described)
            _commit(unfinished, path, run, files | others)
            if mirror:
                mirror.send(path, logs, others)
            _delete_old(path, keep, boundaries)
            if mirror:
                mirror.tidy(path)
        except Exception as error:
            raise write_error(path, workdir, error, mirror) from error
        return path

    return _saves.submit(write_all if first else write_mine)


def _clear(unfinished: Path, others: Collection[int]) -> None:
    """Deletes what another save has left in a folder, but for what `others` write there now."""
    written_now = {f"{arrays.OF_PROCESS}{process}" for process in others}
    for above, folders, files in os.walk(unfinished):
        folders[:] = [name for name in folders if name not in written_now]
        for name in files:
            os.unlink(os.path.join(above, name))


def _write_part(unfinished: Path, part: arrays.Part) -> dict[str, str]:
    """Writes this process's part, and returns the checksums of its files."""
    (unfinished / STATE).mkdir(parents=True, exist_ok=True)
    own = arrays.write(unfinished / STATE, part)
    return checksums.of((file for file in own.rglob("*") if file.is_file()), unfinished)


def _add_parts(
    unfinished: Path, path: Path, part: arrays.Part, others: Collection[str],
    mirror: bucket.Mirror | None,
) -> None:
    """Merges the parts of all processes, of which the files of `others` are not this one's.

    Raises:
        OSError: if they are not where this process looks for them.
    """
    if mirror:
        mirror.bring(path, [file for file in others if arrays.is_node(file)], unfinished)
    elif absent := [file for file in others if not (unfinished / file).is_file()]:
        raise OSError(
            f"another process of the job has written {absent[0]}, and this one does not see it: "
            "--workdir must be a folder that all hosts share, such as a network disk, or "
            "gs://BUCKET/PATH")
    arrays.merge(unfinished / STATE, part)
    if mirror:
        for process in part.owners[1:]:
            shutil.rmtree(unfinished / STATE / f"{arrays.OF_PROCESS}{process}")


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
    reason = bucket.reason(mirror.url, error) if mirror else _in_short(error)
    text = (f"writing {path} failed: {reason} (the last good checkpoint is "
            f"{good[-1] if good else 'none: the run has saved no other'})")
    kind = ProcessLost if isinstance(error, parts.Lost) else WriteError
    return kind(mirror.named(text) if mirror else text)


def _in_short(error: Exception) -> str:
    """The text of an error on one line, without the details that TensorStore adds in brackets."""
    text = re.split(r" \[(?:tensorstore_spec|source locations|kvstore_spec)=", str(error))[0]
    return " ".join(text.split()) or type(error).__name__


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


def _commit(unfinished: Path, path: Path, run: Mapping[str, Any], known: dict[str, str]) -> None:
    """Adds run.json and checksums.json to a checkpoint and gives it its final name, `path`.

    `known` are the checksums of files that have been looked at, some of which may be elsewhere.
    """
    replace_text(unfinished / "run.json", json.dumps(run, indent=1) + "\n")
    there = (file for file in unfinished.rglob("*") if file.is_file())
    new = checksums.of(
        (file for file in there if str(file.relative_to(unfinished)) not in known), unfinished)
    files = dict(sorted((known | new).items()))
    replace_text(unfinished / checksums.FILE, checksums.listing(files))
    shutil.rmtree(path, ignore_errors=True)  # a damaged checkpoint of the same position
    unfinished.rename(path)


def _delete_old(newest: Path, keep: int, boundaries: set[int]) -> None:
    """Deletes checkpoints except the last `keep` up to `newest` and those at `boundaries`.

    Unfinished ones up to `newest` are deleted too, as whoever wrote them was killed. Checkpoints
    after `newest` are damaged, and are replaced when the run comes to their positions.
    """
    for path in newest.parent.glob(f"*{UNFINISHED}"):
        if path.name < newest.name:
            shutil.rmtree(path)
    written = [path for path in finished(newest.parents[1]) if path <= newest]
    for path in written[:-keep]:
        if int(path.name) not in boundaries:
            shutil.rmtree(path)
