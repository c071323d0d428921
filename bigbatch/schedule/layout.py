"""Which device and which pass takes which ghost batch of an update.

The examples of an update, in order, form a list of ghost batches. Each device is assigned
consecutive ghost batches of this list and computes them in one or more passes. A slot holds one
ghost batch of one device in one pass, and a microbatch is what all devices take in one pass. All
devices have the same number of slots; slots that no ghost batch fills are padding slots, whose
weight is 0. The layout decides where the work is done and does not change the update's result.
"""

import functools
from typing import NamedTuple

import numpy as np

from bigbatch.mistake import Mistake

# What a pass takes beyond its slots, in the time of a slot: it reads and writes the sums.
PASS = 1 / 8


class Layout(NamedTuple):
    """How the ghost batches of one update are assigned to devices and passes."""

    ghosts: int  # ghost batches in the update
    devices: int
    microbatches: int  # passes
    slots: int  # of each device in each pass
    alone: bool = False  # whether the first device takes all of them

    @property
    def idle_share(self) -> float:
        """The share of the slots that are padding slots."""
        return 1.0 - self.ghosts / (self.devices * self.microbatches * self.slots)


def make_layout(
    batch_size: int, ghost_size: int, devices: int, max_per_device_batch: int, microbatches: int
) -> Layout:
    """Assigns the ghost batches of an update to devices and passes.

    Args:
        batch_size: examples in the update, a whole number of ghost batches.
        ghost_size: examples in a ghost batch.
        devices: the number of devices that share the update.
        max_per_device_batch: the most examples that a device takes in one pass.
        microbatches: 0 for the passes within `max_per_device_batch` that take least time. Any other
            value is the number of passes, whatever `max_per_device_batch`; there are fewer passes
            if a device's ghost batches fill fewer.

    Raises:
        Mistake: if `microbatches` is 0 and a ghost batch is larger than `max_per_device_batch`.
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
                f"of {ghost_size}, which cannot be divided; raise it to {ghost_size} or more."
            )
        passes = _quickest(each, most)
    slots = -(-each // passes)
    return Layout(ghosts, devices, -(-each // slots), slots)


def _quickest(each: int, most: int) -> int:
    """The number of passes that takes least time for `each` ghost batches, at most `most` a pass.

    Padding slots take as long as others, and a pass takes PASS besides. Passes of less than half of
    what fits are not considered, because a small pass leaves much of a device unused.
    """
    least = -(-each // most)
    return min(range(least, min(2 * least, each) + 1),
               key=lambda passes: passes * (-(-each // passes) + PASS))


def ghosts_by_slot(layout: Layout) -> np.ndarray:
    """The number of the ghost batch in each slot, -1 in a padding slot.

    Returns:
        int32 (microbatches, devices, slots).
    """
    each = layout.ghosts if layout.alone else -(-layout.ghosts // layout.devices)
    own = np.arange(layout.microbatches * layout.slots)
    ghosts = np.arange(layout.devices)[:, None] * each + own
    ghosts = np.where((own < each) & (ghosts < layout.ghosts), ghosts, -1)
    ghosts = ghosts.reshape(layout.devices, layout.microbatches, layout.slots)
    return ghosts.transpose(1, 0, 2).astype(np.int32)


@functools.lru_cache(maxsize=2)  # called for every update
def examples_by_slot(layout: Layout, ghost_size: int) -> tuple[np.ndarray, np.ndarray]:
    """The examples that each device takes in each pass.

    Returns:
        Two read-only arrays, int32 (microbatches, devices, slots x ghost_size): the example's
        position in the batch, and how many ghost batches of the update come after its own. A
        padding slot repeats a real example, so that its values stay finite, and has -1 in the
        second array.
    """
    ghosts = ghosts_by_slot(layout)[..., None]
    positions = np.maximum(ghosts, 0) * ghost_size + np.arange(ghost_size, dtype=np.int32)
    after = np.where(ghosts >= 0, layout.ghosts - 1 - ghosts, -1).repeat(ghost_size, axis=-1)
    shape = layout.microbatches, layout.devices, -1
    positions, after = positions.reshape(shape), after.reshape(shape)
    positions.flags.writeable = after.flags.writeable = False  # the cache returns the same arrays
    return positions, after


def lay_out_examples(records_Bx3: np.ndarray, layout: Layout, ghost_size: int) -> np.ndarray:
    """The examples of each microbatch, one row of four numbers per example.

    Args:
        records_Bx3: (record, epoch, position in the epoch) of the update's examples, in order.
        layout: of the update.
        ghost_size: examples in a ghost batch.

    Returns:
        int32 (microbatches, devices x slots x ghost_size, 4): the three numbers of `records_Bx3`
        and the number of ghost batches after the example's own; see `examples_by_slot`.
    """
    positions, after = examples_by_slot(layout, ghost_size)
    examples = np.empty((*positions.shape, 4), np.int32)
    examples[..., :3] = records_Bx3.take(positions, axis=0)
    examples[..., 3] = after
    return examples.reshape(layout.microbatches, -1, 4)
