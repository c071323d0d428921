"""Where a compiled program comes from: this machine's cache, the bucket of the run, the compiler.

They are tried in this order, and the places that do not have it receive it.
"""

import contextlib
import enum
from typing import Any

import jax

from bigbatch.job import jax_private
from bigbatch.storage.bucket_programs import BucketPrograms


class Origin(enum.Enum):
    """Where a program came from, as timing.jsonl calls it."""

    COMPILER = "compiled"
    MACHINE = "local cache"
    BUCKET = "bucket"


def obtain(
    lowered: jax.stages.Lowered, bucket: BucketPrograms | None = None
) -> tuple[jax.stages.Compiled, Origin]:
    """Loads a program from JAX's cache on this machine or from the bucket, or else compiles it.

    Args:
        lowered: the program.
        bucket: the programs of the run in its bucket; None if its workdir is a folder. It is not
            used where JAX keeps no programs on this machine.

    Raises:
        Exception: what the compiler raises.
    """
    cache = _Cache(bucket)
    with jax_private.cache_seen_as(cache.in_front_of, any_folder=bucket is not None):
        compiled = lowered.compile()
    cache.share()
    return compiled, cache.origin


class _Cache:
    """What JAX takes for its cache while it obtains one program: its own, and then the bucket."""

    def __init__(self, bucket: BucketPrograms | None):
        self.origin = Origin.COMPILER
        self._bucket = bucket
        self._local: Any = None  # JAX's own cache
        self._entry: tuple[str, bytes] | None = None  # the key and the program
        self._unfit = False  # whether an entry was found that JAX could not load

    def in_front_of(self, local: Any) -> "_Cache":
        """This cache, with JAX's own behind it."""
        self._local = local
        return self

    def get(self, key: str) -> bytes | None:
        """See `jax_private.cache_seen_as`."""
        origin, program = Origin.MACHINE, self._local.get(key)
        if program is None and self._bucket:
            origin, program = Origin.BUCKET, self._bucket.fetch(key)
        if program is not None:
            self.origin, self._entry = origin, (key, program)
        return program

    def put(self, key: str, program: bytes) -> None:
        """See there."""
        self._unfit = self.origin is not Origin.COMPILER
        self.origin, self._entry = Origin.COMPILER, (key, program)
        self._local.put(key, program)

    def share(self) -> None:
        """Gives the program to the other places that can keep it."""
        if not self._entry or not self._bucket:
            return
        if self.origin is Origin.BUCKET:
            with contextlib.suppress(OSError):  # the next start can fetch it again
                self._local.put(*self._entry)
        else:
            self._bucket.send(*self._entry, replace=self._unfit)
