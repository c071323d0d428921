"""The order of the examples: a new permutation of the training set in each epoch.

Position p of a run (p examples seen) is position p % N of epoch p // N, whatever the batch size. An
update takes the next B positions, which may lie in two epochs. Pure NumPy.

Up to `IN_MEMORY` examples the permutation is an array, of which two are kept, 4 bytes an example
each. Making one takes 20 bytes an example for a while: 2 GB and half a minute of one core for the
largest. Beyond, it is a function of the position that keeps nothing (`scattered`).
"""

import functools
import operator

import numpy as np

from bigbatch.mistake import Mistake

# Part of the generator's key: no other random numbers of the same seed come from this stream.
ORDER_TAG = 0x6F726465
IN_MEMORY = 10**8  # examples up to which the order of an epoch is an array
MOST = 2**31 - 1  # examples: record numbers are int32
ROUNDS = 12  # of `scattered`, an even number


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
    draws = _generator(seed, epoch, examples).random_raw(examples)
    order = np.argsort(draws, kind="stable").astype(np.int32)
    order.flags.writeable = False  # the cache returns the same array
    return order


def scattered(seed: int, epoch: int, examples: int, positions: np.ndarray) -> np.ndarray:
    """The records at some positions of an epoch, in an order that no array holds.

    A Feistel network permutes the numbers below the least power of 2 that is not under N: it
    changes one half of a number's bits by a function of the other half, and then the other way
    round, `ROUNDS` times. A number that comes out as N or more goes in again until it comes out
    below, which permutes those below N.

    Args:
        seed: as in `permutation`, as are the next two.
        epoch: counted from 0.
        examples: N.
        positions: in the epoch, each from 0 to N - 1.

    Returns:
        int64, as many. Over all positions each record comes once.

    Raises:
        Mistake: if an argument is out of its range.
    """
    keys = _round_keys(seed, epoch, examples)
    bits = max(2, (examples - 1).bit_length())
    low = np.uint64(bits // 2)  # bits of the lower half
    masks = [np.uint64(2 ** (bits - bits // 2) - 1), np.uint64(2 ** (bits // 2) - 1)]
    found = np.array(positions, np.uint64)
    over = np.arange(found.size)
    while over.size:
        halves = [found[over] >> low, found[over] & masks[1]]
        for turn, key in enumerate(keys):
            one, other = turn % 2, 1 - turn % 2
            halves[one] = halves[one] ^ (_mixed(halves[other] ^ key) & masks[one])
        found[over] = halves[0] << low | halves[1]
        over = over[found[over] >= examples]
    return found.astype(np.int64)


@functools.lru_cache(maxsize=4)
def _round_keys(seed: int, epoch: int, examples: int) -> np.ndarray:
    return _generator(seed, epoch, examples).random_raw(ROUNDS)


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """Each of some 64-bit numbers, with every bit depending on all (the end of SplitMix64)."""
    numbers = (numbers ^ numbers >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ numbers >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return numbers ^ numbers >> np.uint64(31)


def _generator(seed: int, epoch: int, examples: int) -> np.random.Philox:
    """The bits from which the order of an epoch follows; raises Mistake for a wrong argument."""
    seed, epoch, examples = map(operator.index, (seed, epoch, examples))
    if not 0 <= seed < 2**32:
        raise Mistake(f"the seed is {seed}; it must lie in [0, 2**32).")
    if epoch < 0:
        raise Mistake(f"the epoch is {epoch}; it must be 0 or more.")
    if not 1 <= examples <= MOST:
        raise Mistake(f"there are {examples} examples; there must be from 1 to 2**31 - 1.")
    return np.random.Philox(key=np.array([ORDER_TAG << 32 | seed, epoch], np.uint64))


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
        part[:, 1] = epoch
        part[:, 2] = np.arange(first, first + taken)
        part[:, 0] = (permutation(seed, epoch, examples)[first : first + taken]
                      if examples <= IN_MEMORY else
                      scattered(seed, epoch, examples, np.arange(first, first + taken)))
        done += taken
    return rows
