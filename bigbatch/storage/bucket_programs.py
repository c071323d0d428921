"""Keeps the compiled programs of a run in the bucket of its workdir, for machines to come.

The machine of a run that goes on may be a new one with an empty disk, as a slice of preemptible
TPUs is, and would compile for minutes what was compiled before. So each program is one object in
`programs/` of the workdir. The object's name is JAX's key of the program, which
`jax_private.cache_seen_as` describes, and its first bytes are the checksum of the rest.

Training can do without. The first request that fails, or is not answered in time, is the last one
of this run: it is told once, and the programs are compiled. A program is code that this machine
will run, so it is read from nowhere but the workdir of the run itself.
"""

import hashlib
import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from bigbatch.job.output import say
from bigbatch.storage import bucket

FOLDER = "programs"
FETCH_SECONDS = 15.0  # for one request of `fetch`, for which the compiler waits
SEND_SECONDS = 300.0  # for one of `send`
LAST_SECONDS = 10.0  # for the uploads still under way when the run ends
CHECKSUM_BYTES = 64  # SHA-256, in hexadecimal


class BucketPrograms:
    """The compiled programs of one run, in its bucket. No method raises an error of the bucket."""

    def __init__(self, workdir: str, writing: bool):
        """Args:
        workdir: of the run, gs://bucket/path.
        writing: whether this process uploads programs, which one process of a job does.
        """
        self.url = f"{workdir.rstrip('/')}/{FOLDER}"
        self._files, self._root = bucket.connect(self.url)
        self._writing, self._given_up = writing, False
        self._listed: set[str] | None = None  # the keys in the bucket; None before they are asked
        self._lock = threading.Lock()
        self._to_send: queue.SimpleQueue[tuple[str, bytes, bool] | None] = queue.SimpleQueue()
        self._sender = threading.Thread(target=self._send_all, name="programs", daemon=True)
        if writing:
            self._sender.start()

    def fetch(self, key: str) -> bytes | None:
        """Downloads the program with this key; None if the bucket has none that is whole."""
        if self._given_up:
            return None
        try:
            if key not in self._keys():
                return None
            content = self._content(key)
            checksum, program = content[:CHECKSUM_BYTES], content[CHECKSUM_BYTES:]
            if checksum == _checksum(program):
                return program
            self._keys().discard(key)  # so the one that is compiled instead is sent
        except Exception as error:  # gcsfs raises the errors of three libraries
            self._give_up(error)
        return None

    def send(self, key: str, program: bytes, replace: bool = False) -> None:
        """Uploads a program in the background, if this process is the one that does.

        Args:
            key: of the program.
            program: as `fetch` returns it.
            replace: whether to upload it even where the bucket has one with this key.
        """
        if self._writing:
            self._to_send.put((key, program, replace))

    def close(self) -> None:
        """Waits for the uploads still under way, at most `LAST_SECONDS`."""
        self._to_send.put(None)
        if self._writing:
            self._sender.join(LAST_SECONDS)

    def _send_all(self) -> None:
        while (item := self._to_send.get()) and not self._given_up:
            key, program, replace = item
            try:
                if replace or key not in self._keys():
                    self._files.pipe_file(
                        self._object(key), _checksum(program) + program, timeout=SEND_SECONDS)
                    self._keys().add(key)
            except Exception as error:
                self._give_up(error)

    def _keys(self) -> set[str]:
        """The keys of the programs in the bucket, which is asked for them once."""
        with self._lock:
            if self._listed is None:
                found = self._files.find(self._root, timeout=FETCH_SECONDS)
                self._listed = {path.removeprefix(self._root + "/") for path in found}
            return self._listed

    def _content(self, key: str) -> bytes:
        try:
            return self._files.cat_file(self._object(key), timeout=FETCH_SECONDS)
        except FileNotFoundError:  # deleted since it was listed
            return b""

    def _object(self, key: str) -> str:
        return f"{self._root}/{key}"

    def _give_up(self, error: Exception) -> None:
        if not self._given_up:
            self._given_up = True
            why = ("the bucket did not answer in time." if isinstance(error, TimeoutError)
                   else bucket.reason(self.url, error))
            say(f"bigbatch: {self.url} is not used any more: {why} Programs that this machine does "
                "not have are compiled.")


def _checksum(program: bytes) -> bytes:
    return hashlib.sha256(program).hexdigest().encode()


@contextmanager
def opened(mirror: bucket.Mirror | None, writing: bool) -> Iterator[BucketPrograms | None]:
    """The programs beside a mirrored workdir; None of one that is a folder.

    Args:
        mirror: of the workdir.
        writing: see `BucketPrograms`.
    """
    if mirror is None:
        yield None
        return
    programs = BucketPrograms(mirror.url, writing)
    try:
        yield programs
    finally:
        programs.close()
