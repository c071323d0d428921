"""Which updates are followed by a log line, an evaluation or a checkpoint."""

from collections.abc import Callable, Mapping


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
        reaches or passes a multiple of the interval `name`, or ends the run.
    """
    every = {name: max(1, round(epochs * examples)) for name, epochs in every_epochs.items()}

    def is_due(name: str, start: int, end: int) -> bool:
        return end // every[name] > start // every[name] or end == total

    return is_due
