"""Workdirs in a bucket (gs://bucket/path): a local folder that mirrors one, down and up.

Objects can be neither appended to, renamed nor locked. So a run works in a folder of this machine.
What it needs is brought down at its start; at each checkpoint the logs go up whole, as they stood
when the save was asked for, then the checkpoint's files, and `checksums.json` last: a checkpoint
without it is unfinished.

gcsfs is used directly, and not through etils.epath, which has no writes with a precondition (see
`lease.py`) and no listing that is sure to be fresh.
"""

import contextlib
import errno
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bigbatch.mistake import Mistake
from bigbatch.storage import lease
from bigbatch.storage.workdir import local_folder

SCHEME = "gs://"
LOGS = ("config.json", "metrics.jsonl", "timing.jsonl")
MARKER = "checksums.json"  # what makes a checkpoint a finished one
SILENT_SECONDS = 60  # of a connection, before a request is made anew


def in_bucket(path: str | Path) -> bool:
    """Whether a path names something in a bucket."""
    return str(path).startswith(SCHEME)


def connect(url: str) -> tuple[Any, str]:
    """The file system (gcsfs) of `url`, and the path of `url` in it: "bucket/path".

    Raises:
        Mistake: if gcsfs is not there, or `url` names no bucket.
    """
    root = url.removeprefix(SCHEME).strip("/")
    if not root:
        raise Mistake(f"{url} names no bucket; write gs://BUCKET/PATH.")
    # Otherwise gcsfs asks a second service what kind of bucket it is, and warns where it may not.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    try:
        import aiohttp
        import gcsfs
    except ImportError:
        raise Mistake(
            f"{url} needs the package gcsfs: pip install gcsfs, or bigbatch with its extra gcs."
        ) from None
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # what it raises is said here, once
    silence = aiohttp.ClientTimeout(total=None, sock_connect=20, sock_read=SILENT_SECONDS)
    return gcsfs.GCSFileSystem(use_listings_cache=False, requests_timeout=silence), root


def check(url: str) -> None:
    """Looks whether a bucket can be read.

    Raises:
        Mistake: if not, with what to do.
    """
    files, root = connect(url)
    with explained(url):
        files.call("GET", "b/{}/o", root.partition("/")[0], maxResults="1")


@contextlib.contextmanager
def explained(url: str) -> Iterator[None]:
    """Makes what gcsfs raises inside, on reading `url`, a Mistake of one line."""
    try:
        yield
    except Exception as error:  # gcsfs passes on those of three libraries
        if isinstance(error, Mistake):
            raise
        raise Mistake(f"{url} cannot be used: {reason(url, error)}") from error


def reason(url: str, error: Exception) -> str:
    """What went wrong with the bucket of `url`, or with its mirror here, and what to do."""
    bucket = url.removeprefix(SCHEME).partition("/")[0]
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)  # names no file, as a rule
    if full or getattr(error, "filename", None):
        return (
            f"{error.strerror}, on this machine's own disk. TMPDIR sets where a run works, and "
            "XDG_CACHE_HOME where data is copied to."
        )
    text = " ".join((str(error) or type(error).__name__).split())
    if isinstance(error, FileNotFoundError):
        return f"there is no bucket {bucket!r}, or not for this account ({text})."
    if str(error).startswith("Forbidden") or getattr(error, "code", None) in (401, "401"):
        return (
            f"access is refused ({text}). Log in with `gcloud auth application-default login`, or "
            f"give this machine's service account the role Storage Object Admin on {bucket!r}."
        )
    return text.removesuffix(".") + "."


@contextlib.contextmanager
def opened(workdir: str | Path) -> Iterator[tuple[Path, "Mirror | None"]]:
    """The local folder of a workdir and, where that is in a bucket, the mirror it belongs to.

    Raises:
        Mistake: if it is neither a folder nor in a bucket.
    """
    if not in_bucket(workdir):
        yield local_folder(workdir), None
        return
    with tempfile.TemporaryDirectory(
        prefix="bigbatch-", ignore_cleanup_errors=True  # a save that failed may still be under way
    ) as folder:
        yield Path(folder), Mirror(str(workdir), Path(folder))


class Mirror:
    """A folder of this machine that stands for a workdir in a bucket.

    Of a finished checkpoint it has the folder, which is empty unless the checkpoint is being read
    or written. Methods raise what gcsfs raises, unless they say otherwise.
    """

    def __init__(self, url: str, folder: Path):
        """`url` is the workdir's, `folder` an empty one."""
        self.url = url.rstrip("/")
        self.folder = folder
        self._files, self._root = connect(url)
        self._lease: lease.Lease | None = None
        self._sent: dict[str, tuple[int, int]] = {}  # logs as they are in the bucket

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Makes this job the only one that writes there, and brings the logs down.

        Raises:
            Mistake: if another job holds the workdir, or the bucket cannot be used.
        """
        held = lease.Lease(self._files, self._root + "/lease.json", self.url)
        with explained(self.url):
            held.take()
        try:
            self._lease = held
            self.bring_down_logs()
            yield
        finally:
            held.release()

    def bring_down_logs(self) -> None:
        """The logs, but for TensorBoard's, whose files a new start does not continue.

        Raises:
            Mistake: if the bucket cannot be used.
        """
        with explained(self.url):
            there = self._files.find(self._root, maxdepth=1)
            wanted = [name for name in LOGS if f"{self._root}/{name}" in there]
            self._files.get([f"{self._root}/{name}" for name in wanted],
                            [str(self.folder / name) for name in wanted])
        self._sent = {name: _stamp(self.folder / name) for name in wanted}

    def list_checkpoints(self) -> list[str]:
        """Makes an empty folder for each finished checkpoint; what to say of unfinished ones.

        Raises:
            Mistake: if the bucket cannot be used.
        """
        with explained(self.url):
            listed = self._checkpoints()
        notices = []
        for name, objects in sorted(listed.items()):
            if MARKER in objects:
                (self.folder / "checkpoints" / name).mkdir(parents=True, exist_ok=True)
            else:
                notices.append(
                    f"{self.url}/checkpoints/{name} was not finished ({MARKER} is missing), and is "
                    "not used"
                )
        return notices

    def fetch(self, path: Path) -> None:
        """Fills the folder of a finished checkpoint, but for what is removed meanwhile.

        Raises:
            Mistake: if the bucket cannot be used.
        """
        with explained(self.url), contextlib.suppress(FileNotFoundError):
            objects = self._checkpoints(path.name).get(path.name, [])
            self._files.get([self._object(path / name) for name in objects],
                            [str(path / name) for name in objects])

    def empty(self, path: Path) -> None:
        """Leaves nothing of a checkpoint here but its name."""
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)

    def logs(self) -> dict[str, int]:
        """The logs as they stand: their sizes, by path in the workdir. They only grow."""
        files = [self.folder / name for name in LOGS] + [*self.folder.glob("tensorboard/*")]
        return {str(file.relative_to(self.folder)): file.stat().st_size
                for file in files if file.is_file()}

    def send_logs(self, logs: Mapping[str, int]) -> None:
        """Replaces the logs in the bucket by these first bytes of those here.

        Raises:
            OSError: if another job has taken the workdir.
        """
        self._lease.check()
        for name, size in logs.items():
            stamp = _stamp(self.folder / name)
            if self._sent.get(name) == stamp:
                continue
            with (self.folder / name).open("rb") as file:
                self._files.pipe_file(f"{self._root}/{name}", file.read(size))
            if stamp[0] == size:
                self._sent[name] = stamp

    def send(self, path: Path, logs: Mapping[str, int]) -> None:
        """Brings a checkpoint up, after the logs that belong to it; its folder is then empty, or
        gone if that failed.

        Raises:
            OSError: if another job has taken the workdir.
        """
        files = [file for file in sorted(path.rglob("*")) if file.is_file() and file.name != MARKER]
        try:
            self.send_logs(logs)
            self._remove(path.name, self._checkpoints(path.name).get(path.name, []))
            self._files.put(list(map(str, files)), list(map(self._object, files)))
            self._lease.renew()
            self._files.pipe_file(self._object(path / MARKER), (path / MARKER).read_bytes())
        except Exception:
            shutil.rmtree(path, ignore_errors=True)
            raise
        self.empty(path)

    def tidy(self, newest: Path) -> None:
        """Removes what is there up to `newest` and has no folder here, or was never finished."""
        for name, objects in self._checkpoints().items():
            kept = MARKER in objects and (newest.parent / name).exists()
            if name <= newest.name and not kept:
                self._remove(name, objects)

    def named(self, text: str) -> str:
        """A text about this folder, about the bucket instead."""
        return text.replace(str(self.folder), self.url)

    def _checkpoints(self, name: str = "") -> dict[str, list[str]]:
        """The objects of each checkpoint there, or of the one called `name`; by its name."""
        above = f"{self._root}/checkpoints/"
        found: dict[str, list[str]] = {}
        for path in self._files.find(above + name):
            checkpoint, _, below = path.removeprefix(above).partition("/")
            if checkpoint.isdigit() and below:
                found.setdefault(checkpoint, []).append(below)
        return found

    def _remove(self, name: str, objects: list[str]) -> None:
        for below in sorted(objects, key=lambda below: below != MARKER):  # the marker first
            with contextlib.suppress(FileNotFoundError):
                self._files.rm_file(f"{self._root}/checkpoints/{name}/{below}")

    def _object(self, path: Path) -> str:
        return f"{self._root}/{path.relative_to(self.folder)}"


def _stamp(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns
