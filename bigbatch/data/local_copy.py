"""Copies a TFDS data set from a bucket to this machine's disk, once.

ArrayRecord's own reader accepts gs:// paths. But for every record it requests the rest of the file
and breaks the connection off after that record (40 random records of CIFAR-10 took 40 requests and
40 broken connections), and it reads an absent file as a file without records.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from bigbatch.data.splits import NOT_OF_TFDS
from bigbatch.job.output import say
from bigbatch.mistake import Mistake
from bigbatch.storage import bucket, caches


class _Object(NamedTuple):
    """A file in a bucket."""

    size: int  # in bytes
    generation: str  # the bucket's number for what the last write left, which no other write has


def bring_down(builder: Any, splits: tuple[str, ...]) -> Any:
    """Copies the files of `splits` to this machine, unless they are there already.

    The copies are under `bigbatch/data` in $XDG_CACHE_HOME (by default ~/.cache), where the next
    start finds them. The processes of a host share them: one copies while the others wait. A data
    set that was written anew in the bucket gets a folder of its own, so that no run reads files
    of both, and a run that reads the older copy goes on with it.

    Args:
        builder: the TFDS builder of a data set in a bucket.
        splits: such as 'train' or 'train[:90%]'; a split that does not exist is ignored.

    Returns:
        A TFDS builder of the same data set that reads the copies.

    Raises:
        Mistake: if the files do not fit on the disk, cannot be read or written, or are replaced in
            the bucket while they are copied.
    """
    from tensorflow_datasets.core.read_only_builder import builder_from_directory

    url = os.fspath(builder.data_path)
    above = Path(caches.folder("data", url.removeprefix(bucket.SCHEME))).expanduser()
    files, root = bucket.connect(url)
    try:
        above.mkdir(parents=True, exist_ok=True)
        with (above / "lock").open("w") as lock, bucket.explained(url):
            fcntl.flock(lock, fcntl.LOCK_EX)
            found = _found(files, root)
            folder = above / _version(found)
            folder.mkdir(exist_ok=True)
            missing = {
                name: found[name].size for name in _wanted(found, builder, splits)
                if not _has(folder / name, found[name].size)
            }
            older = {path.name for path in above.iterdir()} - {"lock", folder.name}
            total, free = sum(missing.values()), shutil.disk_usage(folder).free
            if total > free:
                raise Mistake(
                    f"{url} is copied to {folder} before it is read, and {total / 1e9:.1f} GB do "
                    f"not fit there ({free / 1e9:.1f} GB are free): set XDG_CACHE_HOME to a folder "
                    "on a larger disk, or --config.data.dir to where the bucket is mounted"
                    + (f"; or delete what else is in {above}, which are copies of an older state "
                       "of the bucket." if older else ".")
                )
            if missing:
                say(f"bigbatch: copying {len(missing)} files, {total / 1e9:.3f} GB, from {url} "
                    f"to {folder} ...")
                if older:
                    say(f"bigbatch: what else is in {above} are copies of an older state of the "
                        "bucket; they may be deleted when no run reads them.")
            for name in missing:
                part = folder / (name + ".part")
                files.get_file(f"{root}/{name}", str(part))
                if part.stat().st_size != missing[name]:
                    raise Mistake(
                        f"{url}/{name} has {missing[name]} bytes, of which "
                        f"{part.stat().st_size} were copied: start again."
                    )
                part.replace(folder / name)
            if missing and _found(files, root) != found:
                raise Mistake(
                    f"{url} was written anew while it was copied: start again when all of it is "
                    "there.")
    except OSError as error:
        raise Mistake(
            f"{url} cannot be copied to {above}: {error.strerror or error}; set XDG_CACHE_HOME to "
            "a folder that can be written."
        ) from error
    return builder_from_directory(folder)


def _found(files: Any, root: str) -> dict[str, _Object]:
    """The files of a data set in a bucket, by name."""
    entries = files.find(root, maxdepth=1, detail=True)
    return {path.removeprefix(root + "/"): _Object(entry["size"], str(entry["generation"]))
            for path, entry in sorted(entries.items())}


def _version(found: Mapping[str, _Object]) -> str:
    """A name for the data set as it is in the bucket now: another one after any write to it."""
    return hashlib.sha256(json.dumps(list(found.items())).encode()).hexdigest()[:16]


def _wanted(found: Iterable[str], builder: Any, splits: tuple[str, ...]) -> list[str]:
    """The names among `found` of the shards of `splits` and of the metadata files."""
    shards = set()
    for split in splits:
        try:
            instructions = builder.info.splits[split].file_instructions
        except NOT_OF_TFDS:  # `tfds_records` refuses it by name
            continue
        shards |= {os.path.basename(instruction.filename) for instruction in instructions}
    return [name for name in found if name in shards or name.endswith((".json", ".txt"))]


def _has(file: Path, size: int) -> bool:
    return file.is_file() and file.stat().st_size == size
