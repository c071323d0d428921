"""What is due when: logs, evaluations and checkpoints, as functions of the examples seen."""

from collections.abc import Callable, Mapping


def make_due(
    every_epochs: Mapping[str, float], examples: int, total: int
) -> Callable[[str, int, int], bool]:
    """What is due after which update.

    Args:
        every_epochs: the intervals by name, as {"log": 0.1, "eval": 1.0, "checkpoint": 10.0}.
        examples: N, of an epoch.
        total: examples of the run, at whose end everything is due.

    Returns:
        is_due(name, start, end): whether the update from example `start` to `end` reaches a
        multiple of that interval.
    """
    every = {name: max(1, round(epochs * examples)) for name, epochs in every_epochs.items()}

    def is_due(name: str, start: int, end: int) -> bool:
        return end // every[name] > start // every[name] or end == total

    return is_due
