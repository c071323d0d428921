"""Lengths of a run: a number of epochs, or a text with a unit, such as "1.2e9 tokens".

A run counts examples, so a length in another unit becomes a whole number of them, the nearest.
"""

import math
import re
from fractions import Fraction
from typing import Any

from ml_collections.config_dict import FieldReference

from bigbatch.mistake import Mistake

UNITS = ("epochs", "examples", "tokens", "updates")
KINDS = (float, str)  # of the value of such a key
ALLOWED = ("a number of epochs, or a length such as '3 epochs', '5e5 examples', '1.2e9 tokens' or "
           "'2000 updates' (of recipe.batch_size)")
_NUMBER = re.compile(r"\s*([-+]?[\d_]*\.?[\d_]*(?:e[-+]?\d{1,3})?)\s*([a-z]+)\s*", re.IGNORECASE)


class Length(FieldReference):
    """The value of a key that takes a number or a text; a whole number becomes a float."""

    def __init__(self, default: float | str):
        super().__init__(default, field_type=KINDS)

    def set(self, value: Any, type_safe: bool = True) -> None:
        """Sets the value, of one of KINDS."""
        super().set(float(value) if type(value) is int else value, type_safe)


def is_one(text: Any) -> bool:
    """Whether something is a text of a finite number and a word, whatever the word."""
    found = _NUMBER.fullmatch(text) if isinstance(text, str) else None
    return found is not None and _is_number(found[1])


def in_epochs(
    value: float | str, examples: int, tokens: int | None, batch_size: int, where: str
) -> float:
    """A length in epochs, from which `round(epochs x examples)` gives the examples that it is.

    Args:
        value: a number, which is returned as it is, or a text; see `ALLOWED`.
        examples: N, the examples of an epoch.
        tokens: of an example; None if the task has none.
        batch_size: of the reference, for a length in updates.
        where: the key that has the value, for messages.

    Raises:
        Mistake: if it is no length, or one in tokens of examples that have none.
    """
    if not isinstance(value, str):
        return value
    if not is_one(value):
        raise Mistake(f"{where} is {value!r}; it must be {ALLOWED}.")
    number, unit = _NUMBER.fullmatch(value).groups()
    if unit not in UNITS:
        raise Mistake(f"{where} is {value!r}; the units of a length are {', '.join(UNITS)}.")
    if unit == "epochs":
        return float(number)
    if unit == "tokens" and tokens is None:
        raise Mistake(
            f"{where} is {value!r}, but the examples of config.task have no tokens: state it in "
            "epochs, examples or updates."
        )
    stated = Fraction(number) * (batch_size if unit == "updates" else 1) / (
        tokens if unit == "tokens" else 1)
    whole = round(stated)
    if not whole and stated > 0:
        whole = 1
    return whole / examples


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
