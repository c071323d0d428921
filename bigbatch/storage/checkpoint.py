"""Checkpoints, of which only whole ones (complete and undamaged) are used.

A checkpoint is a folder `checkpoints/<examples seen>` with `state/` (arrays, see `arrays.py`),
`run.json` (position, config, phases) and `checksums.json`, which is written last. While it is
written, the folder's name ends in `.unfinished`; it is renamed when all files are complete.

This file finds and reads them; `writing.py` writes them. The argument `mirror` is None for a
workdir in a local folder; see `bucket.Mirror`.
"""

import contextlib
import hashlib
import json
import re
import warnings
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from bigbatch.job import devices, processes
from bigbatch.mistake import Mistake
from bigbatch.storage import arrays, bucket, checksums, tree

UNFINISHED = ".unfinished"
STATE = Path("state/state")  # where the arrays are in a checkpoint: as Orbax has them
NETWORKS = ("params", "batch_stats", "average")  # the fields of a state that networks are made of
ADDED = ("mu_weight", "nu_weight")  # arrays that older versions did not save: see update.adam


class Found(NamedTuple):
    """The newest whole checkpoint, and the faults of newer ones."""

    path: Path | None  # None: there is no checkpoint
    run: dict[str, Any]  # the content of its run.json; {} if there is no checkpoint
    faults: list[str]  # one text a damaged file or unfinished checkpoint


class Opened(NamedTuple):
    """A whole checkpoint of a run, to be read."""

    path: Path
    run: dict[str, Any]  # the content of its run.json
    mirror: bucket.Mirror | None  # see above


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
                "a workdir must be a folder that all hosts share, such as a network disk, or "
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
            faults = [f"the arrays in {path / 'state'} cannot be opened ({in_short(error)})"]
    return list(map(mirror.named, faults)) if mirror else faults


def restore(path: Path, like: Any, mirror: bucket.Mirror | None = None) -> Any:
    """Reads the state of a checkpoint that was found whole: of it what this process's devices hold.

    Args:
        path: of the checkpoint.
        like: a tree of arrays, or of their shapes and types, that the saved state has too.
        mirror: see above.

    Returns:
        The state in the same tree: with a sharding of `like` a jax.Array, without one a NumPy
        array. A field that is None stays None. Of `ADDED` what an older version did not save is
        nan.

    Raises:
        Mistake: if the state cannot be read, or is another one.
    """
    with _explained(path, mirror):
        place, names = _arrays(path, mirror)
        wanted, there = tree.arrays_of(like), set(jax.tree.leaves(names))
        older = {name: array for name, array in wanted.items()
                 if name not in there and name.rpartition(".")[2] in ADDED}
        found = arrays.read(place, {name: wanted[name] for name in wanted if name not in older})
        return tree.with_arrays(like, found | {
            name: _unknown(array) for name, array in older.items()})


def _unknown(like: Any) -> Any:
    """An array of nan, where it is wanted."""
    array = np.full(like.shape, np.nan, like.dtype)
    return devices.place(array, like.sharding) if getattr(like, "sharding", None) else array


@contextlib.contextmanager
def _explained(path: Path, mirror: bucket.Mirror | None) -> Iterator[None]:
    """Turns an error in the block, which reads the checkpoint `path`, into a Mistake."""
    try:
        yield
    except (OSError, ValueError) as error:
        if isinstance(error, Mistake):
            raise
        where = mirror.named(str(path)) if mirror else path
        raise Mistake(
            f"{where} was whole, and cannot be read: {in_short(error)}. Start the job again."
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
    with opened(workdir, examples_seen) as found:
        return found.run, restore(found.path, shapes(found, fields), found.mirror)


@contextlib.contextmanager
def opened(
    workdir: str | Path, examples_seen: int | None = None, in_job: bool = False
) -> Iterator[Opened]:
    """A checkpoint of a run, to be read during the block by `shapes` and `restore`.

    Args:
        workdir: a folder, or gs://bucket/path.
        examples_seen: see `load`. A newer one that is not whole is warned of.
        in_job: see `find_newest`.

    Raises:
        Mistake: see `load`.
    """
    with bucket.opened(workdir) as (local, mirror):
        if examples_seen is None:
            found = find_newest(local, mirror, in_job)
        else:
            found = find_at(local, examples_seen, mirror, in_job)
        if found.path is None:
            raise Mistake(
                f"{workdir} has no checkpoint: no run was made there, or it has saved none yet.")
        for fault in found.faults:  # so an older checkpoint is read than the newest
            warnings.warn(f"{fault}; read is the checkpoint at {found.run['examples_seen']}",
                          stacklevel=4)
        yield Opened(found.path, found.run, mirror)


def shapes(found: Opened, fields: Collection[str] = ()) -> dict[str, Any]:
    """The shapes and types of a checkpoint's arrays, in the tree that `load` returns.

    Args:
        found: the checkpoint.
        fields: see `load_run`.

    Raises:
        Mistake: if they cannot be read.
    """
    with _explained(found.path, found.mirror):
        there = _shapes(found.path, found.mirror)
    return {key: there[key] for key in there if not fields or key in fields}


def identity(found: Opened) -> str:
    """A digest that only a checkpoint with the same files has, whichever process reads it."""
    return hashlib.sha256(
        _content(found.path / checksums.FILE, found.mirror).encode()).hexdigest()


def find_at(
    workdir: Path, examples_seen: int, mirror: bucket.Mirror | None, in_job: bool = False
) -> Found:
    """The checkpoint at a position, if it is whole; its path is None if there is none at all.

    Args:
        workdir: the local folder.
        examples_seen: the position.
        mirror: see above.
        in_job: see `find_newest`.

    Raises:
        Mistake: if there are only others, or it is not whole.
    """
    def look() -> list[int]:
        if mirror:
            mirror.list_checkpoints()
        return [int(path.name) for path in finished(workdir)]

    positions = processes.decided_by_first("checkpoints", look) if in_job else look()
    if not positions:
        return Found(None, {}, [])
    where = mirror.url if mirror else workdir
    if examples_seen not in positions:
        raise Mistake(
            f"{where} has no checkpoint at {examples_seen!r} examples seen; those that it has are "
            f"at {', '.join(map(str, positions))}."
        )
    path = folder(workdir, examples_seen)
    faults = _faults_by_all(path, mirror) if in_job else faults_of(path, mirror)
    if wrong := "; ".join(faults):
        raise Mistake(f"{wrong}: this checkpoint is not whole.")
    return Found(path, _run_of(path, mirror), [])


def _run_of(path: Path, mirror: bucket.Mirror | None) -> dict[str, Any]:
    return json.loads(_content(path / "run.json", mirror))


def _content(file: Path, mirror: bucket.Mirror | None) -> str:
    return (mirror.read(file) if mirror else file.read_bytes()).decode()


def _arrays(path: Path, mirror: bucket.Mirror | None) -> tuple[arrays.Place, Any]:
    """Where the arrays of the checkpoint `path` are, and the state's tree with their names."""
    text = _content(path / STATE / tree.FILE, mirror)
    where = mirror.place(path / STATE) if mirror else path / STATE
    return arrays.Place(where, tree.uses_zarr3(text)), tree.read(text)


def _shapes(path: Path, mirror: bucket.Mirror | None) -> dict[str, Any]:
    place, names = _arrays(path, mirror)
    there = arrays.shapes(place, jax.tree.leaves(names))
    return jax.tree.map(there.__getitem__, names)


def in_short(error: Exception) -> str:
    """The text of an error on one line, without the details that TensorStore adds in brackets."""
    text = re.split(r" \[(?:tensorstore_spec|source locations|kvstore_spec)=", str(error))[0]
    return " ".join(text.split()) or type(error).__name__
