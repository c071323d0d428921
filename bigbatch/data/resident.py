"""Arrays that lie on the devices for the whole run, and how an update takes some of their rows."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from bigbatch.data.examples import TAKEN


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """The arrays of a field, such as images of one size, each in one row.

    A TPU lays an array of shape (N, height, width, channels) out with N along its vectors. To take
    images out of it, its compiler first writes the whole array in another order, at each update.
    Rows it takes as they are. For a CPU the two are the same bytes.

    Attributes:
        rows_NxP: (N, numbers of an example), such as uint8 (N, height x width x channels). (N,)
            where an example has one number.
        size: the shape of one example, such as (height, width, channels).
    """

    rows_NxP: Any  # an array, or what stands for one: a shape, a sharding
    size: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    def take(self, record_B: jax.Array) -> jax.Array:
        """The arrays of these numbers, which are not checked: (B, *size)."""
        rows_BxP = self.rows_NxP.at[record_B].get(mode="promise_in_bounds")
        return rows_BxP.reshape(-1, *self.size)


def lay_out(arrays: np.ndarray | jax.Array) -> Rows:
    """The same arrays, each in one row; of a NumPy array or one on a device, no copy is made."""
    count, *size = arrays.shape
    return Rows(arrays.reshape(count, math.prod(size)) if size else arrays, tuple(size))


def fields_of(held: Mapping[str, Any], fed: Mapping[str, Any], record_B: jax.Array) -> dict:
    """The fields of a microbatch, by name: those that came with it, or else rows of a resident set.

    Args:
        held: what lies on the device: a `Rows` for each field, or none.
        fed: what came with the microbatch: an array for each field, or none.
        record_B: the numbers of the rows.
    """
    given = {name: fed[name] for name in fed if name not in TAKEN}
    return given or {
        name: rows.take(record_B) for name, rows in held.items() if name not in TAKEN}
