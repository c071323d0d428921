"""Images that lie on the devices for the whole run, and how an update takes some of them."""

import dataclasses
import math
from typing import Any

import jax
import numpy as np


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ResidentImages:
    """Images of one size, each in one row.

    A TPU lays an array of shape (N, height, width, channels) out with N along its vectors. To take
    images out of it, its compiler first writes the whole array in another order, at each update.
    Rows it takes as they are. For a CPU the two are the same bytes.

    Attributes:
        rows_NxP: uint8 (N, height x width x channels).
        size: (height, width, channels).
    """

    rows_NxP: Any  # an array, or what stands for one: a shape, a sharding
    size: tuple[int, int, int] = dataclasses.field(metadata={"static": True})

    def take(self, record_B: jax.Array) -> jax.Array:
        """The images of these numbers, which are not checked: (B, height, width, channels)."""
        rows_BxP = self.rows_NxP.at[record_B].get(mode="promise_in_bounds")
        return rows_BxP.reshape(-1, *self.size)


def lay_out_images(images_NxHxWxC: np.ndarray | jax.Array) -> ResidentImages:
    """The same images, each in one row; of a NumPy array or one on a device, no copy is made."""
    count, *size = images_NxHxWxC.shape
    return ResidentImages(images_NxHxWxC.reshape(count, math.prod(size)), tuple(size))
