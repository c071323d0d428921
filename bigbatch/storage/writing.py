"""Writes checkpoints in the background; `checkpoint.py` says what they consist of.

Each process writes the pieces of the state that it owns: the first one everything that all devices
have. It alone adds the other files and waits for the others' parts; the others wait for nobody. The
argument `mirror` is None for a workdir in a local folder; see `bucket.Mirror`.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import jax

from bigbatch.job.output import say
from bigbatch.storage import arrays, bucket, checksums, parts, tree
from bigbatch.storage.checkpoint import STATE, UNFINISHED, finished, folder, in_short
from bigbatch.storage.logs import replace_text

# Saves may overlap, but one thread writes them, in the order in which they were started.
_saves = ThreadPoolExecutor(1, thread_name_prefix="save")


class WriteError(RuntimeError):
    """A checkpoint or a log could not be written. The text names it and the last checkpoint."""


class ProcessLost(WriteError):
    """A checkpoint could not be written, because another process of the job was lost."""


def make_room(state: Any) -> Future:
    """Starts to make the memory that saves of a state need, which may take longer than a save.

    Args:
        state: a tree of arrays with shardings, or of their shapes and types.
    """
    return _saves.submit(arrays.make_room, state)


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
            parts.tell(save, None, in_short(error))
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
    reason = bucket.reason(mirror.url, error) if mirror else in_short(error)
    text = (f"writing {path} failed: {reason} (the last good checkpoint is "
            f"{good[-1] if good else 'none: the run has saved no other'})")
    kind = ProcessLost if isinstance(error, parts.Lost) else WriteError
    return kind(mirror.named(text) if mirror else text)


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
