"""On which ghost batches the entries of an array depend, said axis by axis."""

import operator
from collections.abc import Callable, Sequence
from functools import reduce
from typing import NamedTuple

import numpy as np

GHOSTS = 2  # how many ghost batches the network is traced on; ghost batch g is the bit 1 << g


class Dependence(NamedTuple):
    """On which ghost batches an array's entries depend for certain, as sets of bits.

    The entry at an index depends on `everywhere` and, for each axis in `along`, on the set at its
    index on this axis.
    """

    everywhere: int = 0
    along: dict[int, np.ndarray] = {}  # never changed in place
    varies: frozenset[int] = frozenset()  # axes along which a value that depends on none may vary
    origin: str = ""  # the user's line that first made an entry depend on several; "" if unknown
    drawn: bool = False  # whether random numbers of a key of no example are in it

    @property
    def none(self) -> bool:
        return not self.everywhere and not any(bits.any() for bits in self.along.values())

    @property
    def mixed(self) -> bool:
        """Whether an entry depends on more than one ghost batch."""
        return any(bits & (bits - 1) for bits in map(int, self._sets()))

    def _sets(self) -> np.ndarray:
        along = [np.unique(bits | self.everywhere) for bits in self.along.values()]
        return np.concatenate([[self.everywhere], *along]).astype(int)


def by_ghost(size: int) -> np.ndarray:
    """The sets of an axis of `size` entries that lie ghost batch by ghost batch."""
    return np.repeat(1 << np.arange(GHOSTS, dtype=np.uint8), size // GHOSTS)


def constant(shape: Sequence[int]) -> Dependence:
    """That of an array that depends on no example, and may vary along all of its axes."""
    return Dependence(varies=frozenset(range(len(shape))))


def joined(operands: Sequence[Dependence]) -> Dependence:
    """What depends on an entry at the same index of all operands."""
    along: dict[int, np.ndarray] = {}
    for operand in operands:
        for axis, bits in operand.along.items():
            along[axis] = along[axis] | bits if axis in along else bits
    everywhere = reduce(operator.or_, (operand.everywhere for operand in operands), 0)
    return Dependence(everywhere, along, frozenset().union(*(one.varies for one in operands)))


def relabelled(operand: Dependence, place: Callable[[int], int | None]) -> Dependence:
    """With the axis `place(axis)` for each axis; what lies along an axis without one is dropped."""
    along = {place(axis): bits for axis, bits in operand.along.items() if place(axis) is not None}
    varies = frozenset(place(axis) for axis in operand.varies if place(axis) is not None)
    return Dependence(operand.everywhere, along, varies)
