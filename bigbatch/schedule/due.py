"""Which updates are followed by a log line, an evaluation or a checkpoint."""

from collections.abc import Callable, Iterator, Mapping


def interval(epochs: float, examples: int) -> int:
    """An interval in examples, 1 or more; `examples` is N, those of an epoch."""
    return max(1, round(epochs * examples))


def make_due(
    every_epochs: Mapping[str, float], examples: int, total: int
) -> Callable[[str, int, int], bool]:
    """Makes the function that tells whether something is due after an update.

    Args:
        every_epochs: intervals in epochs by name, as {"log": 0.1, "eval": 1.0, "checkpoint": 10.0}.
        examples: N, the examples of an epoch.
        total: the examples of the run; at its end everything is due.

    Returns:
        is_due(name, start, end): whether the update from position `start` to `end` (examples seen)
        reaches or passes a multiple of the interval `name`, or ends the run. What has no interval
        never is due.
    """
    every = {name: interval(epochs, examples) for name, epochs in every_epochs.items()}

    def is_due(name: str, start: int, end: int) -> bool:
        if name not in every:
            return False
        return end // every[name] > start // every[name] or end == total

    return is_due


def ends_due(every: int, start: int, end: int, batch_size: int, total: int) -> Iterator[int]:
    """The ends of those updates between two positions after which something is due.

    They are those of which `make_due` says so; the updates between them are not looked at, of which
    a run may have billions.

    Args:
        every: see `interval`.
        start: the position at which the first update begins.
        end: the position at which the last one ends.
        batch_size: of all of them.
        total: see `make_due`.
    """
    while start < end:
        wanted = min((start // every + 1) * every, total)
        start += -(-(wanted - start) // batch_size) * batch_size
        if start <= end:
            yield start
