"""Copies a TFDS data set from a bucket to this machine's disk, once.

ArrayRecord's own reader accepts gs:// paths. But for every record it requests the rest of the file
and breaks the connection off after that record (40 random records of CIFAR-10 took 40 requests and
40 broken connections), and it reads an absent file as a file without records.
"""

import fcntl
import os
import shutil
from pathlib import Path
from typing import Any

from bigbatch.job.output import say
from bigbatch.mistake import Mistake
from bigbatch.storage import bucket, caches


def bring_down(builder: Any, splits: tuple[str, ...]) -> Any:
    """Copies the files of `splits` to this machine, unless they are there already.

    The copies are under `bigbatch/data` in $XDG_CACHE_HOME (by default ~/.cache), where the next
    start finds them. The processes of a host share them: one copies while the others wait.

    Args:
        builder: the TFDS builder of a data set in a bucket.
        splits: such as 'train' or 'train[:90%]'; a split that does not exist is ignored.

    Returns:
        A TFDS builder of the same data set that reads the copies.

    Raises:
        Mistake: if the files do not fit on the disk, or cannot be read or written.
    """
    from tensorflow_datasets.core.read_only_builder import builder_from_directory

    url = os.fspath(builder.data_path)
    folder = Path(caches.folder("data", url.removeprefix(bucket.SCHEME))).expanduser()
    files, root = bucket.connect(url)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("w") as lock, bucket.explained(url):
            fcntl.flock(lock, fcntl.LOCK_EX)
            missing = {
                name: size for name, size in _wanted(files, root, builder, splits).items()
                if not _has(folder / name, size)
            }
            total, free = sum(missing.values()), shutil.disk_usage(folder).free
            if total > free:
                raise Mistake(
                    f"{url} is copied to {folder} before it is read, and {total / 1e9:.1f} GB do "
                    f"not fit there ({free / 1e9:.1f} GB are free): set XDG_CACHE_HOME to a folder "
                    "on a larger disk, or --config.data.dir to where the bucket is mounted."
                )
            if missing:
                say(f"bigbatch: copying {len(missing)} files, {total / 1e9:.3f} GB, from {url} "
                    f"to {folder} ...")
            for name in missing:
                part = folder / (name + ".part")
                files.get_file(f"{root}/{name}", str(part))
                if part.stat().st_size != missing[name]:
                    raise Mistake(
                        f"{url}/{name} has {missing[name]} bytes, of which "
                        f"{part.stat().st_size} were copied: start again."
                    )
                part.replace(folder / name)
    except OSError as error:
        raise Mistake(
            f"{url} cannot be copied to {folder}: {error.strerror or error}; set XDG_CACHE_HOME to "
            "a folder that can be written."
        ) from error
    return builder_from_directory(folder)


def _wanted(files: Any, root: str, builder: Any, splits: tuple[str, ...]) -> dict[str, int]:
    """The sizes in bytes, by name, of the shards of `splits` and of the metadata files."""
    shards = set()
    for split in splits:
        try:
            instructions = builder.info.splits[split].file_instructions
        except (ValueError, KeyError):  # `sources.tfds_records` refuses it by name
            continue
        shards |= {os.path.basename(instruction.filename) for instruction in instructions}
    found = files.find(root, maxdepth=1, detail=True)
    sizes = {path.removeprefix(root + "/"): entry["size"] for path, entry in found.items()}
    return {name: size for name, size in sizes.items()
            if name in shards or name.endswith((".json", ".txt"))}


def _has(file: Path, size: int) -> bool:
    return file.is_file() and file.stat().st_size == size
