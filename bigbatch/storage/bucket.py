"""Workdirs in a bucket (gs://bucket/path), each mirrored by a local folder in which the run works.

A run does not work in the bucket itself, as objects can be neither appended to, renamed nor locked.
At its start it downloads the logs. Checkpoints are read where they are. At each checkpoint it
uploads the whole logs as they were when the save began, then the checkpoint's files, and
`checksums.json` last: a checkpoint without this file is unfinished.

The code calls gcsfs and not etils.epath, which has no writes with a precondition (see `lease.py`)
and no listing that is guaranteed to be fresh.
"""

import contextlib
import errno
import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from bigbatch.mistake import Mistake
from bigbatch.storage import checksums, lease
from bigbatch.storage.workdir import local_folder

SCHEME = "gs://"
CONFIG = "config.json"
LOGS = (CONFIG, "metrics.jsonl", "timing.jsonl")
MARKER = checksums.FILE  # a checkpoint with this file is finished
BLOCK_BYTES = 16 << 20  # of an object that is read piece by piece
SILENT_SECONDS = 60  # without data, after which a request is repeated


def in_bucket(path: str | Path) -> bool:
    """Whether `path` is a gs:// URL."""
    return str(path).startswith(SCHEME)


def connect(url: str) -> tuple[Any, str]:
    """The gcsfs file system for `url`, and the path of `url` in it, "bucket/path".

    Raises:
        Mistake: if gcsfs is not installed, or `url` names no bucket.
    """
    root = url.removeprefix(SCHEME).strip("/")
    if not root:
        raise Mistake(f"{url} names no bucket; write gs://BUCKET/PATH.")
    # Otherwise gcsfs asks a second service for the kind of the bucket, and warns if refused.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    try:
        import aiohttp
        import gcsfs
    except ImportError:
        raise Mistake(
            f"{url} needs the package gcsfs: pip install gcsfs, or bigbatch with its extra gcs."
        ) from None
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # `reason` reports its errors, once
    silence = aiohttp.ClientTimeout(total=None, sock_connect=20, sock_read=SILENT_SECONDS)
    return gcsfs.GCSFileSystem(use_listings_cache=False, requests_timeout=silence), root


def check(url: str) -> None:
    """Checks that the bucket of `url` can be read.

    Raises:
        Mistake: if it cannot; the text says what to do.
    """
    files, root = connect(url)
    with explained(url):
        files.call("GET", "b/{}/o", root.partition("/")[0], maxResults="1")


@contextlib.contextmanager
def explained(url: str, *passed_on: type[Exception]) -> Iterator[None]:
    """Turns errors inside the block, where `url` is read, into a Mistake of one line."""
    try:
        yield
    except (Mistake, *passed_on):
        raise
    except Exception as error:  # gcsfs raises the errors of three libraries
        raise Mistake(f"{url} cannot be used: {reason(url, error)}") from error


def reason(url: str, error: Exception) -> str:
    """One line on an error in the bucket of `url` or in its local mirror, with what to do."""
    bucket = url.removeprefix(SCHEME).partition("/")[0]
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)  # often without a filename
    if full or getattr(error, "filename", None):
        return (
            f"{error.strerror}, on this machine's own disk. TMPDIR sets the folder in which a run "
            "works, and XDG_CACHE_HOME the one that data is copied to."
        )
    text = " ".join((str(error) or type(error).__name__).split())
    if isinstance(error, FileNotFoundError):
        return f"there is no bucket {bucket!r}, or this account cannot see it ({text})."
    if str(error).startswith("Forbidden") or getattr(error, "code", None) in (401, "401"):
        return (
            f"access is refused ({text}). Log in with `gcloud auth application-default login`, or "
            f"give this machine's service account the role Storage Object Admin on {bucket!r}."
        )
    return text.removesuffix(".") + "."


@contextlib.contextmanager
def opened(workdir: str | Path) -> Iterator[tuple[Path, "Mirror | None"]]:
    """The local folder of a workdir, and its mirror if the workdir is in a bucket (else None).

    The folder of a mirror is temporary and ends with the block.

    Raises:
        Mistake: if `workdir` is neither a local path nor a gs:// URL.
    """
    if not in_bucket(workdir):
        yield local_folder(workdir), None
        return
    with tempfile.TemporaryDirectory(
        prefix="bigbatch-", ignore_cleanup_errors=True  # a failed save may still be writing
    ) as folder:
        yield Path(folder), Mirror(str(workdir), Path(folder))


class Mirror:
    """A local folder that mirrors a workdir in a bucket.

    It holds the logs, and a folder for each finished checkpoint, which is empty unless the
    checkpoint is being written. Methods raise the errors of gcsfs unless they say
    otherwise.
    """

    def __init__(self, url: str, folder: Path):
        """Args:
        url: of the workdir, gs://bucket/path.
        folder: an empty local folder.
        """
        self.url = url.rstrip("/")
        self.folder = folder
        self._files, self._root = connect(url)
        self._lease: lease.Lease | None = None
        self._sent: dict[str, tuple[int, int]] = {}  # `_stamp` of each log that was sent

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Holds the workdir's lease during the block, and downloads the logs first.

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
        """Downloads the logs, except TensorBoard's, as each start writes a new TensorBoard file.

        Raises:
            Mistake: if the bucket cannot be used.
        """
        with explained(self.url):
            objects = self._files.find(self._root, maxdepth=1)
            present = [name for name in LOGS if f"{self._root}/{name}" in objects]
            self._files.get([f"{self._root}/{name}" for name in present],
                            [str(self.folder / name) for name in present])
        self._sent = {name: _stamp(self.folder / name) for name in present}

    def list_boards(self) -> list[str]:
        """The names of TensorBoard's files in the bucket, which are not downloaded.

        Raises:
            Mistake: if the bucket cannot be used.
        """
        with explained(self.url):
            found = self._files.find(f"{self._root}/tensorboard")
        return [path.rpartition("/")[2] for path in found]

    def list_checkpoints(self) -> list[str]:
        """Creates an empty folder for each finished checkpoint in the bucket.

        Returns:
            A notice for each unfinished checkpoint.

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

    def read(self, path: Path) -> bytes:
        """The content of the object that the local `path` stands for.

        Raises:
            FileNotFoundError: if there is none.
            Mistake: if the bucket cannot be used.
        """
        with explained(self.url, FileNotFoundError):
            return self._files.cat_file(self._object(path))

    def digest(self, path: Path) -> str:
        """The SHA-256 of an object, of which no more than a few MB are here at a time.

        Raises:
            FileNotFoundError: if there is none.
            Mistake: if the bucket cannot be used.
        """
        with explained(self.url, FileNotFoundError), self._files.open(
            self._object(path), "rb", block_size=BLOCK_BYTES, cache_type="readahead"
        ) as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()

    def place(self, path: Path) -> tuple[str, str]:
        """The bucket, and the path in it, of the folder that the local `path` stands for."""
        bucket, _, below = self._object(path).partition("/")
        return bucket, below

    def logs(self) -> dict[str, int]:
        """The present sizes of the logs in bytes, by path in the workdir. Logs only grow.

        But config.json is replaced after a decision, so no size says what to read of it: -1.
        """
        files = [self.folder / name for name in LOGS] + [*self.folder.glob("tensorboard/*")]
        return {str(file.relative_to(self.folder)): -1 if file.name == CONFIG
                else file.stat().st_size for file in files if file.is_file()}

    def send_logs(self, logs: Mapping[str, int]) -> None:
        """Uploads the first bytes of each log, as many as `logs` says, where the log has changed.

        All bytes of one for which it says -1.

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
            if size in (-1, stamp[0]):
                self._sent[name] = stamp

    def send_part(self, written: Path, path: Path) -> None:
        """Uploads what another process than the first has written, and deletes it here.

        Args:
            written: the local folder in which it was written.
            path: of the checkpoint that it is a part of.
        """
        try:
            files = [file for file in sorted(written.rglob("*")) if file.is_file()]
            self._files.put(list(map(str, files)),
                            [self._object(path / file.relative_to(written)) for file in files])
        finally:
            shutil.rmtree(written, ignore_errors=True)

    def bring(self, path: Path, names: Collection[str], to: Path) -> None:
        """Downloads files of the checkpoint `path`, by their paths in it, into the folder `to`."""
        self._files.get([self._object(path / name) for name in names],
                        [str(to / name) for name in names])

    def send(self, path: Path, logs: Mapping[str, int], others: Collection[str] = ()) -> None:
        """Uploads the logs and then the checkpoint `path`, and empties its local folder.

        If that fails, the local folder is deleted.

        Args:
            path: of the checkpoint.
            logs: see `send_logs`.
            others: the files of the other processes, by their paths in the checkpoint. They are in
                the bucket already.

        Raises:
            OSError: if another job has taken the workdir.
        """
        files = [file for file in sorted(path.rglob("*")) if file.is_file() and file.name != MARKER]
        try:
            self.send_logs(logs)
            objects = self._checkpoints(path.name).get(path.name, [])
            self._remove(path.name, [below for below in objects if below not in others])
            self._files.put(list(map(str, files)), list(map(self._object, files)))
            self._lease.renew()
            self._files.pipe_file(self._object(path / MARKER), (path / MARKER).read_bytes())
        except Exception:
            shutil.rmtree(path, ignore_errors=True)
            raise
        shutil.rmtree(path)
        path.mkdir()

    def tidy(self, newest: Path) -> None:
        """Deletes from the bucket the checkpoints up to `newest` that are unfinished or have no
        local folder.
        """
        for name, objects in self._checkpoints().items():
            kept = MARKER in objects and (newest.parent / name).exists()
            if name <= newest.name and not kept:
                self._remove(name, objects)

    def named(self, text: str) -> str:
        """`text` with the URL of the workdir in place of the local folder, for messages."""
        return text.replace(str(self.folder), self.url)

    def _checkpoints(self, name: str = "") -> dict[str, list[str]]:
        """The objects of each checkpoint in the bucket, or of the one called `name`: {checkpoint's
        name: [path below its folder]}.
        """
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
        """The path in the bucket of the local `path`."""
        return f"{self._root}/{path.relative_to(self.folder)}"


def _stamp(file: Path) -> tuple[int, int]:
    """(size in bytes, time of the last change in ns), which differ once a file has changed."""
    status = file.stat()
    return status.st_size, status.st_mtime_ns
