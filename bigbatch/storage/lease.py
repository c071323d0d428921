"""A lease, which lets only one job write to a workdir in a bucket, where no file can be locked.

The lease is an object that its holder rewrites every `BEAT_SECONDS`. Each write names the
generation of the object that it replaces, so of two jobs that write at once one fails. Another job
may take a lease that was not rewritten for `STALE_SECONDS` by that job's clock. The holder rewrites
the lease before it marks a checkpoint as finished, and fails there if another job took the lease.
"""

import contextlib
import json
import os
import threading
import time
import uuid
from typing import Any

from bigbatch.job.output import say
from bigbatch.mistake import Mistake

BEAT_SECONDS = 10.0  # between two renewals by the holder
STALE_SECONDS = 30.0  # without a renewal, after which another job may take the lease
LOOK_SECONDS = 1.0  # between two reads by a job that waits for the lease


class Lost(OSError):
    """Another job has taken the lease."""


class Lease:
    """The exclusive right to write to a workdir in a bucket. Errors name the job that holds it."""

    def __init__(self, files: Any, path: str, workdir: str):
        """Args:
        files: the gcsfs file system of the bucket.
        path: of the lease's object, "bucket/path".
        workdir: the workdir's URL, for messages.
        """
        self._files, self._workdir = files, workdir
        self._object = tuple(path.split("/", 1))
        self._id = uuid.uuid4().hex
        self._beats = 0
        self._generation = "0"  # of the object that this job wrote last; "0" before any
        self._lock = threading.Lock()
        self._ended = threading.Event()

    def take(self) -> None:
        """Takes the lease, and renews it from a thread until `release`.

        Waits `STALE_SECONDS` first if there is a lease, which may be that of a killed job.

        Raises:
            Mistake: if another job holds the lease and renews it.
        """
        while not self._write_over("0"):
            found = self._find()
            if found and self._stands_still(found):
                if not self._write_over(found):
                    raise Mistake(self._held_by())
                break
        threading.Thread(target=self._keep, name="lease", daemon=True).start()

    def renew(self) -> None:
        """Rewrites the lease.

        Raises:
            Lost: if another job has taken the lease.
        """
        with self._lock:
            if not self._write_over(self._generation):
                raise Lost(self._taken())

    def check(self) -> None:
        """Checks that this job still holds the lease.

        Reads and does not write, unless the lease has changed: a bucket accepts only about one
        write a second to the same object.

        Raises:
            Lost: if another job has taken the lease.
        """
        with self._lock:
            if self._find() != self._generation and not self._write_over(self._generation):
                raise Lost(self._taken())

    def release(self) -> None:
        """Deletes the lease if this job still holds it, so that the next job need not wait."""
        self._ended.set()
        with self._lock, contextlib.suppress(Exception):  # it becomes stale all the same
            self._files.call("DELETE", "b/{}/o/{}", *self._object,
                             ifGenerationMatch=self._generation)

    def _keep(self) -> None:
        """Renews the lease until `release`, in a thread."""
        while not self._ended.wait(BEAT_SECONDS):
            with contextlib.suppress(Exception):  # a lasting fault is raised by the next commit
                self.renew()

    def _stands_still(self, generation: str) -> bool:
        """Waits `STALE_SECONDS`: True if the lease stays unchanged, False once it is deleted.

        Raises:
            Mistake: if the holder renews the lease meanwhile.
        """
        say(f"bigbatch: {self._held_by()} Waiting for {STALE_SECONDS:g} s to see whether that "
            "job still renews its lease ...")
        until = time.monotonic() + STALE_SECONDS
        while time.monotonic() < until:
            time.sleep(LOOK_SECONDS)
            now = self._find()
            if now is None:
                return False
            if now != generation:
                raise Mistake(self._held_by())
        return True

    def _write_over(self, generation: str) -> bool:
        """Writes the lease if its generation is `generation` ("0": there is no lease), or if this
        job wrote it. Returns whether it was written.
        """
        self._beats += 1
        mine = json.dumps({"holder": self._id, "beat": self._beats, "process": os.getpid(),
                           "host": os.uname().nodename}).encode()
        bucket, name = self._object
        upload = self._files.base.removesuffix("storage/v1/") + "upload/storage/v1/b/{}/o"
        try:
            written = self._files.call(
                "POST", upload, bucket, uploadType="media", name=name, data=mine,
                ifGenerationMatch=generation, json_out=True,
            )
            self._generation = written["generation"]
        except FileExistsError:
            # This job may have written the object itself: gcsfs repeats a request whose answer was
            # lost, and an earlier write may have succeeded although it raised an error.
            found, content = self._find(), self._read()
            if found is None or self._id.encode() not in content:
                return False
            if content != mine:
                return self._write_over(found)
            self._generation = found
        return True

    def _find(self) -> str | None:
        """The generation of the lease's object; None if there is no object."""
        try:
            found = self._files.call("GET", "b/{}/o/{}", *self._object, json_out=True)
        except FileNotFoundError:
            return None
        return found["generation"]

    def _read(self) -> bytes:
        try:
            return self._files.call("GET", "b/{}/o/{}", *self._object, alt="media")[1]
        except FileNotFoundError:
            return b""

    def _taken(self) -> str:
        return f"{self._held_by()} It took the lease because this job had not renewed it in time."

    def _held_by(self) -> str:
        try:
            holder = json.loads(self._read())
            who = f"process {holder['process']} on {holder['host']}"
        except (ValueError, KeyError):
            who = "which one is unknown"
        return (
            f"the workdir {self._workdir} is held by another job ({who}); stop it, or give this "
            "job another --workdir."
        )
