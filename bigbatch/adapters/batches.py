"""The batch of an update: which examples it takes, and in how many micro-batches. Pure Python.

Position p of a run (p examples seen) is place p % N of epoch p // N, whatever the batch size. An
update takes the next B positions, which may lie in two epochs, so each example is seen once an
epoch also where the batch changes.
"""

from collections.abc import Callable, Iterator, Sequence, Sized

from bigbatch.mistake import Mistake
from bigbatch.schedule import Table

# From an epoch, counted from 0, to the indexes of its examples: a list, an array or a tensor that
# has each of the N indexes once, and is the same whenever it is asked for.
Order = Callable[[int], Sequence[int]]


def indexes(order: Order, examples: int, start: int, end: int) -> list[int]:
    """The examples at the positions from `start` up to `end`.

    Args:
        order: of each epoch.
        examples: N, the size of the training set.
        start: the first position.
        end: the position after the last.

    Raises:
        Mistake: if the order of an epoch has another length than N.
    """
    found: list[int] = []
    while start < end:
        epoch, place = divmod(start, examples)
        taken = min(end - start, examples - place)
        epoch_order = order(epoch)
        if len(epoch_order) != examples:
            raise Mistake(
                f"the order of epoch {epoch} has {len(epoch_order)} examples; recipe.examples is "
                f"{examples}, and each must be there once."
            )
        found += map(int, epoch_order[place : place + taken])
        start += taken
    return found


def check_length(dataset: Sized, table: Table) -> None:
    """Raises Mistake for a training set that has not as many examples as the recipe says."""
    if len(dataset) != table.recipe.examples:
        raise Mistake(
            f"the training set has {len(dataset)} examples, and recipe.examples is "
            f"{table.recipe.examples}; they must be equal, so that each is seen once an epoch."
        )


def cut(batch: Sequence, size: int) -> Iterator[Sequence]:
    """The micro-batches of a batch, in order."""
    return (batch[first : first + size] for first in range(0, len(batch), size))


def check_multiples(table: Table, of: int, what: str) -> None:
    """Raises Mistake for a batch that is no multiple of a number, which `what` describes."""
    for phase in table.phases:
        if phase.batch_size % of:
            raise Mistake(
                f"the batch of {phase.batch_size} in phase {phase.name!r} is no multiple of {what};"
                f" make all batches multiples of it with Limits(granularity={of})."
            )


def micro_batches(table: Table, size: int) -> tuple[int, ...]:
    """How many micro-batches of `size` examples an update takes, for each phase.

    Raises:
        Mistake: if a batch is no whole number of them. Their mean would not be the batch's.
    """
    if size < 1:
        raise Mistake(f"the micro-batch is {size}; it must be 1 or more.")
    check_multiples(table, size, f"the micro-batch of {size}")
    return tuple(phase.batch_size // size for phase in table.phases)
