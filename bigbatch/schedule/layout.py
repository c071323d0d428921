"""Which device and which pass takes which ghost batch of an update.

An update is a list of ghost batches in the order of its examples. They are dealt to devices in
runs, and a device takes its run in one or more passes (microbatches). Every device has the same
number of seats; where the ghost batches do not fill them, seats stay empty and weigh nothing. How
they are dealt changes no result, only where the work is done.
"""

import functools
from typing import NamedTuple

import numpy as np

from bigbatch.mistake import Mistake


class Seating(NamedTuple):
    """How the ghost batches of one update are dealt."""

    ghosts: int  # in the update
    devices: int
    microbatches: int  # passes
    seats: int  # ghost batches a device takes in one pass

    @property
    def idle_share(self) -> float:
        """The share of seats that stay empty."""
        return 1.0 - self.ghosts / (self.devices * self.microbatches * self.seats)


def make_seating(
    batch_size: int, ghost_size: int, devices: int, max_per_device_batch: int, microbatches: int
) -> Seating:
    """Deals a batch to devices in as few passes as fit.

    Args:
        batch_size: examples in the update, a whole number of ghost batches.
        ghost_size: examples in a ghost batch.
        devices: how many share the update.
        max_per_device_batch: examples a device takes in one pass at most.
        microbatches: 0, or the number of passes wanted (there are fewer where a device's ghost
            batches fill fewer); `max_per_device_batch` is then not read.

    Raises:
        Mistake: if one ghost batch is over `max_per_device_batch`.
    """
    ghosts = batch_size // ghost_size
    each = -(-ghosts // devices)
    if microbatches:
        passes = min(microbatches, each)
    else:
        most = max_per_device_batch // ghost_size
        if most < 1:
            raise Mistake(
                f"config.max_per_device_batch is {max_per_device_batch}, less than a ghost batch "
                f"of {ghost_size}, which cannot be cut; raise it to {ghost_size} or more."
            )
        passes = -(-each // most)
    seats = -(-each // passes)
    return Seating(ghosts, devices, -(-each // seats), seats)


def ghosts_seated(seating: Seating) -> np.ndarray:
    """Ghost batch numbers by (microbatch, device, seat), int32; -1: an empty seat."""
    each = -(-seating.ghosts // seating.devices)
    own = np.arange(seating.microbatches * seating.seats)
    ghosts = np.arange(seating.devices)[:, None] * each + own
    ghosts = np.where((own < each) & (ghosts < seating.ghosts), ghosts, -1)
    ghosts = ghosts.reshape(seating.devices, seating.microbatches, seating.seats)
    return ghosts.transpose(1, 0, 2).astype(np.int32)


@functools.lru_cache(maxsize=2)  # asked for at every update
def examples_seated(seating: Seating, ghost_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Which example sits where.

    Returns:
        int32 (microbatch, device, example's seat), read-only: the example's place in the update,
        and how many ghost batches come after its own. An empty seat shows a real example (so that
        its numbers are finite) and -1.
    """
    ghosts = ghosts_seated(seating)[..., None]
    places = np.maximum(ghosts, 0) * ghost_size + np.arange(ghost_size, dtype=np.int32)
    after = np.where(ghosts >= 0, seating.ghosts - 1 - ghosts, -1).repeat(ghost_size, axis=-1)
    shape = seating.microbatches, seating.devices, -1
    places, after = places.reshape(shape), after.reshape(shape)
    places.flags.writeable = after.flags.writeable = False  # the cache hands out the arrays
    return places, after


def seat_examples(records_Bx3: np.ndarray, seating: Seating, ghost_size: int) -> np.ndarray:
    """The rows that each microbatch feeds: (record, epoch, place, ghost batches after its own).

    Args:
        records_Bx3: (record, epoch, place) of the update's examples, in order.
        seating: of the update.
        ghost_size: examples in a ghost batch.

    Returns:
        int32 (microbatches, devices x seats x ghost_size, 4); see `examples_seated`.
    """
    places, after = examples_seated(seating, ghost_size)
    examples = np.empty((*places.shape, 4), np.int32)
    examples[..., :3] = records_Bx3.take(places, axis=0)
    examples[..., 3] = after
    return examples.reshape(seating.microbatches, -1, 4)
