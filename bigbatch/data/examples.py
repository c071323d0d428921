"""What a task says of its examples, and what it loads them as."""

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import numpy as np


class Field(NamedTuple):
    """One of the arrays that an example consists of."""

    shape: tuple[int, ...]  # of one example, without an axis of examples
    dtype: np.dtype | type
    # True: in memory the array may be larger along any of its axes, because the config does not
    # say how large it is before `prepare` cuts a part out of it.
    or_larger: bool = False


class InMemory(NamedTuple):
    """A data set that is kept on the devices: NumPy arrays by name, examples on the first axis."""

    train: Mapping[str, np.ndarray]
    test: Mapping[str, np.ndarray]


class Reader(Protocol):
    """Reads the examples of a split one by one, in threads or in processes that it is copied to."""

    def __len__(self) -> int:
        """How many records the split has."""
        ...

    def read(
        self, record: int, epoch: int, position: int
    ) -> tuple[Mapping[str, np.ndarray], str]:
        """Reads an example.

        Args:
            record: its number in the split.
            epoch: the epoch of the run, for what is drawn at random anew in each; 0 for the test.
            position: its position in the epoch, likewise.

        Returns:
            Its arrays by name, and "". For an example that is to be skipped {}, and the reason.

        Raises:
            Mistake: if it cannot be read and is not to be skipped.
        """
        ...


class Streamed(NamedTuple):
    """A data set that is read while the run trains (`config.data.streaming`)."""

    train: Reader
    test: Reader
