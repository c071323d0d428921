"""Which device and which pass takes which ghost batch of an update.

An update is a list of ghost batches in the order of its examples. Each device is assigned
neighbours in that list, and works through them in one or more passes (one microbatch a pass). A
slot is room for one ghost batch of a device in a pass. All devices have the same number of slots;
where the ghost batches do not fill them, the rest are padding slots, which weigh nothing. The
layout changes no result, only where the work is done.
"""

import functools
from typing import NamedTuple

import numpy as np

from bigbatch.mistake import Mistake


class Layout(NamedTuple):
    """How the ghost batches of one update are assigned to devices and passes."""

    ghosts: int  # in the update
    devices: int
    microbatches: int  # passes
    slots: int  # ghost batches a device takes in one pass

    @property
    def idle_share(self) -> float:
        """The share of padding slots."""
        return 1.0 - self.ghosts / (self.devices * self.microbatches * self.slots)


def make_layout(
    batch_size: int, ghost_size: int, devices: int, max_per_device_batch: int, microbatches: int
) -> Layout:
    """Assigns a batch to devices in as few passes as fit.

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
    slots = -(-each // passes)
    return Layout(ghosts, devices, -(-each // slots), slots)


def ghosts_by_slot(layout: Layout) -> np.ndarray:
    """Ghost batch numbers by (microbatch, device, slot), int32; -1: a padding slot."""
    each = -(-layout.ghosts // layout.devices)
    own = np.arange(layout.microbatches * layout.slots)
    ghosts = np.arange(layout.devices)[:, None] * each + own
    ghosts = np.where((own < each) & (ghosts < layout.ghosts), ghosts, -1)
    ghosts = ghosts.reshape(layout.devices, layout.microbatches, layout.slots)
    return ghosts.transpose(1, 0, 2).astype(np.int32)


@functools.lru_cache(maxsize=2)  # asked for at every update
def examples_by_slot(layout: Layout, ghost_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Which example is in which slot.

    Returns:
        int32 (microbatch, device, example's slot), read-only: the example's place in the update,
        and how many ghost batches come after its own. A padding slot repeats a real example, so
        that its values stay finite, with -1.
    """
    ghosts = ghosts_by_slot(layout)[..., None]
    places = np.maximum(ghosts, 0) * ghost_size + np.arange(ghost_size, dtype=np.int32)
    after = np.where(ghosts >= 0, layout.ghosts - 1 - ghosts, -1).repeat(ghost_size, axis=-1)
    shape = layout.microbatches, layout.devices, -1
    places, after = places.reshape(shape), after.reshape(shape)
    places.flags.writeable = after.flags.writeable = False  # the cache hands out the arrays
    return places, after


def lay_out_examples(records_Bx3: np.ndarray, layout: Layout, ghost_size: int) -> np.ndarray:
    """The rows that each microbatch feeds: (record, epoch, place, ghost batches after its own).

    Args:
        records_Bx3: (record, epoch, place) of the update's examples, in order.
        layout: of the update.
        ghost_size: examples in a ghost batch.

    Returns:
        int32 (microbatches, devices x slots x ghost_size, 4); see `examples_by_slot`.
    """
    places, after = examples_by_slot(layout, ghost_size)
    examples = np.empty((*places.shape, 4), np.int32)
    examples[..., :3] = records_Bx3.take(places, axis=0)
    examples[..., 3] = after
    return examples.reshape(layout.microbatches, -1, 4)
