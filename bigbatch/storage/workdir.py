"""The folder of a run: made, checked to be writable, and held by one job."""

import fcntl
import json
import os
from pathlib import Path
from typing import IO, Any

from bigbatch.mistake import Mistake
from bigbatch.storage.logs import replace_text


def local_folder(path: str | Path) -> Path:
    """`path` in full, so that it means the same to all libraries, with ~ expanded.

    Raises:
        Mistake: if it is no path of a file system, such as s3://bucket/run.
    """
    if "://" in str(path) or str(path).startswith("gs:/"):  # a bucket's, as pathlib writes it
        raise Mistake(
            f"{path} is no folder of this machine; give one that all hosts share, such as a "
            "network disk, or a path in a bucket, as the text gs://BUCKET/PATH."
        )
    return Path(path).expanduser().absolute()


def open_workdir(workdir: Path) -> IO[str]:
    """Makes the folder and locks it for this job until the returned file is closed.

    The system drops the lock with the process, however that ends.

    Raises:
        Mistake: if it cannot be made or written, or another job holds it.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = (workdir / "lock").open("a+", encoding="utf-8")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip()
            lock.close()
            raise Mistake(
                f"the workdir {workdir} is held by another job ({holder}); stop it, or give this "
                "one another --workdir."
            ) from None
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {os.uname().nodename}\n")
        lock.flush()
    except OSError as error:
        raise Mistake(
            f"the workdir {workdir} cannot be written: {error.strerror}; give --workdir a folder "
            "that can."
        ) from None
    return lock


def write_config(workdir: Path, run: dict[str, Any]) -> None:
    """Writes config.json: the config and phase table of the run as it goes on now."""
    kept = {key: run[key] for key in ("version", "config", "phases")}
    text = json.dumps(kept, indent=1)
    replace_text(workdir / "config.json", text + "\n")
