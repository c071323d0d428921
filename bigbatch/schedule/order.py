"""The order of the examples: a new permutation of the training set in each epoch.

Position p of a run (p examples seen) is position p % N of epoch p // N, whatever the batch size. An
update takes the next B positions, which may lie in two epochs. Pure NumPy.
"""

import functools
import operator

import numpy as np

from bigbatch.mistake import Mistake

# Part of the generator's key: no other random numbers of the same seed come from this stream.
ORDER_TAG = 0x6F726465


@functools.lru_cache(maxsize=2)  # an update may lie in two epochs; 1.28 million examples take 5 MB
def permutation(seed: int, epoch: int, examples: int) -> np.ndarray:
    """The order of the training set in an epoch: record numbers, int32 (examples,), read-only.

    The order is the stable argsort of the raw stream of a NumPy bit generator, which NumPy keeps
    the same in all releases (NEP 19). `Generator.permutation` and JAX's samplers may change with a
    release, which would change the order of a continued run.

    Args:
        seed: of the run, in [0, 2**32).
        epoch: counted from 0.
        examples: N, the size of the training set, from 1 to 2**31 - 1.

    Raises:
        Mistake: if an argument is out of its range.
    """
    seed, epoch, examples = map(operator.index, (seed, epoch, examples))
    if not 0 <= seed < 2**32:
        raise Mistake(f"the seed is {seed}; it must lie in [0, 2**32).")
    if epoch < 0:
        raise Mistake(f"the epoch is {epoch}; it must be 0 or more.")
    if not 1 <= examples < 2**31:
        raise Mistake(f"there are {examples} examples; there must be from 1 to 2**31 - 1.")
    key = np.array([ORDER_TAG << 32 | seed, epoch], np.uint64)
    draws = np.random.Philox(key=key).random_raw(examples)
    order = np.argsort(draws, kind="stable").astype(np.int32)
    order.flags.writeable = False  # the cache returns the same array
    return order


def records(seed: int, start: int, count: int, examples: int) -> np.ndarray:
    """The examples at positions `start` to `start + count - 1` of a run.

    Args:
        seed: of the run, in [0, 2**32).
        start: the first position (examples seen before it).
        count: the number of examples, which may lie in any number of epochs.
        examples: N, the size of the training set.

    Returns:
        int32 (count, 3): the record in the training set, the epoch, the position in the epoch.

    Raises:
        Mistake: if `start` or `count` is below 0, or for the reasons of `permutation`.
    """
    if start < 0 or count < 0:
        raise Mistake(f"start is {start} and count {count}; both must be 0 or more.")
    if examples < 1:
        raise Mistake(f"there are {examples} examples; there must be 1 or more.")
    rows = np.empty((count, 3), np.int32)
    done = 0
    while done < count:
        epoch, first = divmod(start + done, examples)
        taken = min(count - done, examples - first)
        part = rows[done : done + taken]
        part[:, 0] = permutation(seed, epoch, examples)[first : first + taken]
        part[:, 1] = epoch
        part[:, 2] = np.arange(first, first + taken)
        done += taken
    return rows
