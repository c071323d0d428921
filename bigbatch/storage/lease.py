"""One job a workdir where nothing can be locked: an object that its holder keeps rewriting.

Every write names the generation of the object that it replaces, so of two writers one fails. A
lease that stood still for `STALE_SECONDS`, by the clock of whoever watches it, has lost its holder
and may be taken. The holder rewrites it once more before it makes a checkpoint a finished one, and
fails there if it was taken from it.
"""

import contextlib
import json
import os
import sys
import threading
import time
import uuid
from typing import Any

from bigbatch.mistake import Mistake

BEAT_SECONDS = 10.0
STALE_SECONDS = 30.0
LOOK_SECONDS = 1.0


class Lost(OSError):
    """Another job has taken the lease."""


class Lease:
    """The right to write to a workdir in a bucket."""

    def __init__(self, files: Any, path: str, workdir: str):
        """`path` is the lease's object in `files` (gcsfs); `workdir` is for messages."""
        self._files, self._workdir = files, workdir
        self._object = tuple(path.split("/", 1))
        self._id = uuid.uuid4().hex
        self._beats = 0
        self._generation = "0"  # of the object as this holder last wrote it
        self._lock = threading.Lock()
        self._ended = threading.Event()

    def take(self) -> None:
        """Takes the lease, at once or after watching one that stands still; then keeps it.

        Raises:
            Mistake: if another job holds it.
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
            Lost: if another job has taken it.
        """
        with self._lock:
            if not self._write_over(self._generation):
                raise Lost(self._taken())

    def check(self) -> None:
        """Looks whether the lease is still this job's, without a write if it is as this job knows
        it: a bucket takes about one a second of the same object.

        Raises:
            Lost: if another job has taken it.
        """
        with self._lock:
            if self._find() != self._generation and not self._write_over(self._generation):
                raise Lost(self._taken())

    def release(self) -> None:
        """Gives the lease up, if it is still this job's."""
        self._ended.set()
        with self._lock, contextlib.suppress(Exception):  # else it goes stale
            self._files.call("DELETE", "b/{}/o/{}", *self._object,
                             ifGenerationMatch=self._generation)

    def _keep(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            with contextlib.suppress(Exception):  # the next commit says so, if it lasts
                self.renew()

    def _stands_still(self, generation: str) -> bool:
        """Watches; False if the lease was given up.

        Raises:
            Mistake: if its holder renews it.
        """
        print(f"bigbatch: {self._held_by()} Watching for {STALE_SECONDS:g} s whether it still "
              "lives ...", file=sys.stderr, flush=True)
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
        """Writes the lease if it is of this generation ("0": absent), or of another that is this
        holder's own; whether it was.
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
            # It may be this very write, made anew after its answer was lost on the way, or an
            # earlier one of this holder, of which it never heard.
            found, content = self._find(), self._read()
            if found is None or self._id.encode() not in content:
                return False
            if content != mine:
                return self._write_over(found)
            self._generation = found
        return True

    def _find(self) -> str | None:
        """The generation of the lease; None if there is none."""
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
        return f"{self._held_by()} It took the lease while this one was not heard of."

    def _held_by(self) -> str:
        try:
            holder = json.loads(self._read())
            who = f"process {holder['process']} on {holder['host']}"
        except (ValueError, KeyError):
            who = "of which no more is known"
        return (
            f"the workdir {self._workdir} is held by another job ({who}); stop it, or give this "
            "one another --workdir."
        )
