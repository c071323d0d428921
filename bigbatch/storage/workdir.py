"""The folder of a run: it is created, checked to be writable, and locked by one job at a time."""

import contextlib
import fcntl
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from bigbatch.mistake import Mistake
from bigbatch.storage.logs import replace_text

# Bytes that the longest path below a workdir is longer: of a file of arrays while it is written.
DEEPEST = 250


def local_folder(path: str | Path) -> Path:
    """`path` as an absolute path with ~ expanded, which means the same to all libraries.

    Raises:
        Mistake: if it is a URL, such as s3://bucket/run, or is not text in UTF-8, or there is no
            such home folder.
    """
    if "://" in str(path) or str(path).startswith("gs:/"):  # pathlib makes gs:/ of gs://
        raise Mistake(
            f"{path} is no folder of this machine; give a folder that all hosts share, such as a "
            "network disk, or a path in a bucket, as the text gs://BUCKET/PATH."
        )
    try:
        absolute = Path(path).expanduser().absolute()
    except (RuntimeError, FileNotFoundError) as error:  # no such home, or no current folder
        raise Mistake(
            f"the workdir {path} is nowhere ({error}); give --workdir a whole path.") from None
    try:
        str(absolute).encode()
    except UnicodeEncodeError:
        raise Mistake(
            f"the workdir {str(absolute)!r} is not text in UTF-8, and checkpoints in it could not "
            "be read; give --workdir a folder that is."
        ) from None
    return absolute


@contextlib.contextmanager
def plain_path(path: Path) -> Iterator[Path]:
    """The folder `path` under a path that TensorStore can use, for the time of the block.

    TensorStore takes a backslash for a slash on every system. A folder with one in its path is
    reached through a link in a temporary folder.

    Raises:
        OSError: if there is no folder for the link.
    """
    if _plain(path):
        yield path
        return
    above = None if _plain(tempfile.gettempdir()) else "/tmp"
    with tempfile.TemporaryDirectory(
        prefix="bigbatch-", dir=above, ignore_cleanup_errors=True
    ) as temporary:
        link = Path(temporary) / "checkpoint"
        link.symlink_to(path.absolute(), target_is_directory=True)
        yield link


def _plain(path: str | Path) -> bool:
    return "\\" not in str(path)


def _check_path(workdir: Path) -> None:
    """Refuses a folder in which checkpoints could not be written and read, whatever it holds.

    Raises:
        Mistake: if its path is too long, or is not text in UTF-8.
        OSError: if it takes a link (see `plain_path`), and there can be none.
    """
    longest = os.pathconf(workdir, "PC_PATH_MAX") - DEEPEST
    if len(os.fsencode(workdir)) > longest:
        raise Mistake(
            f"the workdir {str(workdir)[:60]}... has a path of {len(os.fsencode(workdir))} bytes, "
            f"and with the names in it at most {longest} can be opened; give a shorter --workdir."
        )
    with plain_path(workdir) as plain:
        os.listdir(plain)


def open_workdir(workdir: Path) -> IO[str]:
    """Creates the folder and locks it for this job.

    Returns:
        The open lock file. Closing it releases the lock, and so does any end of the process.

    Raises:
        Mistake: if the folder cannot be created or written, checkpoints in it could not be read, or
            another job holds the lock.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        _check_path(workdir)
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
