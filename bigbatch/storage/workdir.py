"""The folder of a run: it is created, checked to be writable, and locked by one job at a time."""

import fcntl
import json
import os
from pathlib import Path
from typing import IO, Any

from bigbatch.mistake import Mistake
from bigbatch.storage.logs import replace_text


def local_folder(path: str | Path) -> Path:
    """`path` as an absolute path with ~ expanded, which means the same to all libraries.

    Raises:
        Mistake: if it is a URL, such as s3://bucket/run.
    """
    if "://" in str(path) or str(path).startswith("gs:/"):  # pathlib makes gs:/ of gs://
        raise Mistake(
            f"{path} is no folder of this machine; give a folder that all hosts share, such as a "
            "network disk, or a path in a bucket, as the text gs://BUCKET/PATH."
        )
    return Path(path).expanduser().absolute()


def open_workdir(workdir: Path) -> IO[str]:
    """Creates the folder and locks it for this job.

    Returns:
        The open lock file. Closing it releases the lock, and so does any end of the process.

    Raises:
        Mistake: if the folder cannot be created or written, or another job holds the lock.
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
                "job another --workdir."
            ) from None
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {os.uname().nodename}\n")
        lock.flush()
    except OSError as error:
        raise Mistake(
            f"the workdir {workdir} cannot be written: {error.strerror}; give --workdir a folder "
            "that can be."
        ) from None
    return lock


def write_config(workdir: Path, run: dict[str, Any]) -> None:
    """Writes config.json: the version, config and phases that the run now continues with."""
    kept = {key: run[key] for key in ("version", "config", "phases")}
    text = json.dumps(kept, indent=1)
    replace_text(workdir / "config.json", text + "\n")
