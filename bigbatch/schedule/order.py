"""Which examples make up an update: a fresh permutation each epoch, read in turn.

Position p of a run is place p % N of epoch p // N, whatever the batch size: an update takes the
next B positions and may straddle epochs. Pure NumPy.
"""

import functools
import operator

import numpy as np

from bigbatch.mistake import Mistake

# Tells the order from everything else that follows from the same seed.
ORDER_TAG = 0x6F726465


@functools.lru_cache(maxsize=2)  # what an update straddles; 1.28 million examples take 5 MB
def permutation(seed: int, epoch: int, examples: int) -> np.ndarray:
    """The order of `examples` records in `epoch`: int32 (examples,), read-only.

    The raw stream of a NumPy bit generator is fixed for good (NEP 19), and so is a stable sort;
    `Generator.permutation` and JAX's samplers may change with a release, which would change the
    order of a run that is continued.

    Raises:
        Mistake: if the seed is not in [0, 2**32), the epoch is below 0, or there is no example.
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
    order.flags.writeable = False  # the cache hands out the array itself
    return order


def records(seed: int, start: int, count: int, examples: int) -> np.ndarray:
    """What stands at positions `start` to `start + count - 1` of a run.

    Args:
        seed: of the run, in [0, 2**32).
        start: examples seen before.
        count: how many, over as many epochs as that takes.
        examples: N, in the training set.

    Returns:
        int32 (count, 3): the record in the training set, the epoch, the place in the epoch.

    Raises:
        Mistake: if `start` or `count` is below 0, there is no example, or as `permutation`.
    """
    if start < 0 or count < 0:
        raise Mistake(f"start is {start} and count {count}; both must be 0 or more.")
    if examples < 1:
        raise Mistake(f"there are {examples} examples; there must be 1 or more.")
    rows = np.empty((count, 3), np.int32)
    done = 0
    while done < count:
        epoch, place = divmod(start + done, examples)
        taken = min(count - done, examples - place)
        part = rows[done : done + taken]
        part[:, 0] = permutation(seed, epoch, examples)[place : place + taken]
        part[:, 1] = epoch
        part[:, 2] = np.arange(place, place + taken)
        done += taken
    return rows
