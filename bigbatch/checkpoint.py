"""Checkpoints that are whole or not used: Orbax's arrays, what they belong to, and checksums.

A checkpoint is a folder `checkpoints/<examples seen>` with `state/` (Orbax), `run.json` (position,
config, phase table) and, written last, `checksums.json`. It takes its name only when all
of it is there; until then the folder ends in `.unfinished`.
"""

import contextlib
import hashlib
import json
import shutil
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from orbax.checkpoint.experimental import v1 as ocp

from bigbatch.metrics import replace_text
from bigbatch.workdir import local_folder

CHECKSUMS = "checksums.json"
UNFINISHED = ".unfinished"
_committing = threading.Lock()  # saves overlap, but two must not delete the same old one


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


def find_newest(workdir: Path) -> Found:
    """The newest checkpoint whose every file has the checksum it was written with.

    Raises:
        ValueError: if there are checkpoints and none is whole. Nothing is deleted.
    """
    faults = []
    for path in reversed(finished(workdir)):
        wrong = faults_of(path)
        if not wrong:
            run = json.loads((path / "run.json").read_text(encoding="utf-8"))
            return Found(path, run, faults)
        faults += wrong
    if faults:
        raise ValueError(
            "no checkpoint is whole, so the run cannot continue (nothing was deleted; restore a "
            "copy, or start anew in another workdir): " + "; ".join(faults)
        )
    return Found(None, {}, [])


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


def restore(path: Path, like: Any) -> Any:
    """The state saved in `path`, laid out as the arrays (or their shapes and shardings) `like`."""
    return ocp.load(path / "state", like)


def load(workdir: str | Path) -> dict[str, Any]:
    """What the newest whole checkpoint of a run holds, for use outside of it.

    Returns:
        `params`, `batch_stats` and `opt_state`, as nested dicts of NumPy arrays.

    Raises:
        ValueError: if there is none.
    """
    return load_from(some_newest(workdir).path)


def some_newest(workdir: str | Path) -> Found:
    """As `find_newest`, where there must be one.

    Raises:
        ValueError: if there is none.
    """
    found = find_newest(local_folder(workdir))
    if found.path is None:
        raise ValueError(f"{workdir} has no checkpoint: no run was made there, or not so far.")
    return found


def load_from(path: Path) -> dict[str, Any]:
    """The arrays of the checkpoint `path`; see `load`."""
    arrays = ocp.metadata(path / "state").metadata
    # Named, or Orbax would lay them out on the devices they were saved from.
    return ocp.load(
        path / "state", jax.tree.map(lambda array: np.empty(array.shape, array.dtype), arrays)
    )


def save(
    workdir: Path, state: Any, run: Mapping[str, Any], keep: int, boundaries: set[int]
) -> Future:
    """Starts saving `state`; returns once it is copied, and a future that ends with the commit.

    Args:
        workdir: of the run.
        state: a tree of arrays, the same on every process.
        run: what goes into run.json; `examples_seen` names the checkpoint.
        keep: so many of the newest stay when the new one is committed.
        boundaries: positions (examples seen) whose checkpoints stay too.

    Raises:
        WriteError: from the future as well as from here.
    """
    path = folder(workdir, run["examples_seen"])
    unfinished = path.with_name(path.name + UNFINISHED)
    try:
        if jax.process_index() == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
        writing = ocp.save_async(unfinished / "state", state)
    except Exception as error:
        raise write_error(path, workdir, error) from error

    def commit() -> Path:
        try:
            writing.result()
            if jax.process_index() == 0:
                with _committing:
                    _commit(unfinished, path, run)
                    _delete_old(path, keep, boundaries)
        except Exception as error:
            raise write_error(path, workdir, error) from error
        return path

    executor = ThreadPoolExecutor(1, thread_name_prefix="save")
    future = executor.submit(commit)
    executor.shutdown(wait=False)
    return future


@contextlib.contextmanager
def names_what_fails(workdir: Path, name: str = "") -> Iterator[None]:
    """Makes an OSError inside, on writing `name` in `workdir`, a WriteError."""
    try:
        yield
    except OSError as error:
        raise write_error(Path(error.filename or workdir / name), workdir, error) from error


def write_error(path: Path, workdir: Path, error: Exception) -> WriteError:
    """What to raise when `path`, a checkpoint or a log in `workdir`, could not be written."""
    good = [str(other) for other in finished(workdir) if other != path]
    return WriteError(
        f"writing {path} failed: {error} (the last good checkpoint is "
        f"{good[-1] if good else 'none: the run has saved no other'})"
    )


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
