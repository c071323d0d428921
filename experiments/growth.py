"""What has grown since a record was made: a habit against updates that become slower unseen."""

from collections.abc import Mapping

GROWTH = 1.03  # beyond which a number counts as grown


def grown(before: Mapping[str, float | None], after: Mapping[str, float | None]) -> list[str]:
    """A line for each number of `after` that is larger than that in `before` by more than 3 %.

    Args:
        before: by names, as the record has them; None where something could not be measured.
        after: the same, measured now. What is not in both is not compared, but for None, which
            counts as grown where the record has a number.
    """
    return [
        f"{name} was {before[name]:.4g} and "
        + ("cannot be had any more" if number is None else f"is {number:.4g}")
        for name, number in after.items()
        if before.get(name) is not None and (number is None or number > GROWTH * before[name])
    ]
