"""The checkpoints that a run is writing: in the background, and committed in order."""

import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from bigbatch.storage import bucket, writing
from bigbatch.storage.continuing import Position

# Each save holds a copy of the state in the host's memory, so they are few. With only one, a
# checkpoint at a phase's end would often wait for the checkpoint just before it.
SAVES_AT_ONCE = 2


class Saves:
    """Saves the state of a run. An error in the background is raised by a later call.

    Attributes:
        newest: the position (examples seen) of the newest checkpoint, written or being written.
        pending: the futures of the checkpoints being written, oldest first.
        boundaries: see `writing.save`.
    """

    def __init__(
        self, folder: Path, mirror: bucket.Mirror | None,
        describe: Callable[[Position], Mapping[str, Any]], keep: int, boundaries: set[int],
        newest: int,
    ):
        """Args:
        folder: the local folder of the run.
        mirror: see `writing.save`.
        describe: returns the content of run.json at a position.
        keep: see `writing.save`.
        boundaries: see there.
        newest: the position of the checkpoint that this start continues from; 0 for none.
        """
        self.newest = newest
        self.pending: deque[Future] = deque()
        self._folder, self._mirror, self._describe = folder, mirror, describe
        self._keep, self.boundaries = keep, boundaries

    def start(self, state: Any, at: Position) -> float:
        """Copies `state` and starts to write it. Waits first while two others are being written.

        Returns:
            The seconds that this call took.

        Raises:
            WriteError: if this or an earlier checkpoint could not be written.
        """
        began = time.perf_counter()
        self._finish(SAVES_AT_ONCE - 1)
        self.pending.append(writing.save(
            self._folder, state, self._describe(at), self._keep, self.boundaries, self._mirror))
        self.newest = at.examples_seen
        return time.perf_counter() - began

    def raise_failures(self) -> None:
        """Raises a WriteError if a checkpoint could not be written; does not wait."""
        self._finish(SAVES_AT_ONCE)

    def wait(self) -> None:
        """Waits until all checkpoints are written; raises a WriteError if one could not be."""
        self._finish(0)

    def _finish(self, leave: int) -> None:
        """Removes finished saves, and waits for the oldest ones until at most `leave` remain."""
        while self.pending and (self.pending[0].done() or len(self.pending) > leave):
            self.pending.popleft().result()
