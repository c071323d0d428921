"""A run's checkpoints under way: written in the background, committed in their order."""

import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from bigbatch.storage import bucket, checkpoint
from bigbatch.storage.continuing import Position

# More, and the host would hold one more copy of the state; with fewer a checkpoint at a phase's end
# would wait for one just before it.
SAVES_AT_ONCE = 2


class Saves:
    """Saves a run's state; what goes wrong in the background is raised by the next call.

    Attributes:
        newest: the examples seen of the newest checkpoint that was asked for.
        pending: futures of those under way, the oldest first.
    """

    def __init__(
        self, folder: Path, mirror: bucket.Mirror | None,
        describe: Callable[[Position], Mapping[str, Any]], keep: int, boundaries: set[int],
        newest: int,
    ):
        """Args:
        folder: of the run.
        mirror: see `checkpoint.save`.
        describe: what a checkpoint records of the run at a position.
        keep: how many of the newest stay.
        boundaries: examples seen at whose checkpoints stay too.
        newest: the examples seen of the checkpoint that this start goes on from; 0 for none.
        """
        self.newest = newest
        self.pending: deque[Future] = deque()
        self._folder, self._mirror, self._describe = folder, mirror, describe
        self._keep, self._boundaries = keep, boundaries

    def start(self, state: Any, at: Position) -> float:
        """Copies `state` and begins to write it; returns how many seconds that blocked.

        Waits while two others are under way.

        Raises:
            WriteError: if this or an earlier one could not be written.
        """
        began = time.perf_counter()
        self._finish(SAVES_AT_ONCE - 1)
        self.pending.append(checkpoint.save(
            self._folder, state, self._describe(at), self._keep, self._boundaries, self._mirror))
        self.newest = at.examples_seen
        return time.perf_counter() - began

    def raise_failures(self) -> None:
        """Raises what went wrong meanwhile; does not wait."""
        self._finish(SAVES_AT_ONCE)

    def wait(self) -> None:
        """Waits until all are written."""
        self._finish(0)

    def _finish(self, leave: int) -> None:
        while self.pending and (self.pending[0].done() or len(self.pending) > leave):
            self.pending.popleft().result()
