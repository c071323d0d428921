"""Which examples a split names: a part that a data set has, or a stretch of one."""

import re

from bigbatch.mistake import Mistake

# What TFDS raises for a split that it does not know; the last for a part of 'all'.
NOT_OF_TFDS = (ValueError, KeyError, NotImplementedError)


def name_of(split: str) -> str:
    """The part of the data set: 'train' of 'train[:90%]'."""
    return split.partition("[")[0]


def stretch(split: str, examples: int) -> range:
    """The numbers of the examples that `split` names, of the `examples` that its part has.

    As TFDS reads it: 'train', 'train[:90%]', 'train[-500:]', 'train[100:200]'; a percentage is
    rounded to the nearest example.

    Raises:
        Mistake: if `split` is none of these, names no example, or reaches beyond the part.
    """
    found = re.fullmatch(r"[^\[\]]+(?:\[(-?\d+)?(%?):(?:(-?\d+)(%?))?\])?", split)
    first, unit, last, other = found.groups() if found else (None,) * 4
    units = {unit for number, unit in ((first, unit), (last, other)) if number}
    if not found or len(units) > 1 or (not units and "[" in split) or (unit and not first):
        raise Mistake(
            f"the split {split!r} is not understood; it must be a name, or a stretch of one as "
            "'train[:90%]', 'train[-500:]' or 'train[100:200]'."
        )

    most = 100 if units == {"%"} else examples
    if any(abs(int(number)) > most for number in (first, last) if number):
        raise Mistake(
            f"the split {split!r} reaches beyond {name_of(split)!r}, which has {examples} "
            f"examples: its bounds must lie in [-{most}, {most}]{' %' * (units == {'%'})}.")

    def bound(text: str | None) -> int | None:
        if text is None:
            return None
        return round(int(text) * examples / 100) if units == {"%"} else int(text)

    numbers = range(examples)[bound(first) : bound(last)]
    if not numbers:
        raise Mistake(f"the split {split!r} is empty: {name_of(split)!r} has {examples} examples.")
    return numbers
