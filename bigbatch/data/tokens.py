"""Sequences of tokens, out of text as bytes, token files or arrays, by their numbers.

Sequence i of a file has its tokens i x length to i x length + length: one more than `length`, since
each but the last is there to predict the next from. So every token of a file but the first is a
target in exactly one sequence, save for the last (tokens - 1) % length, which are left out. Token
files are mapped into memory and may be of any size; text is read whole.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from bigbatch.data import splits, token_files, token_sources
from bigbatch.data.token_files import TokenFile
from bigbatch.data.token_sources import Part
from bigbatch.dotted import is_dotted
from bigbatch.mistake import Mistake

OPTIONS = ("length", "separator", "padding", "dtype", "bytes_per_token", "python")


class Options(NamedTuple):
    """What `config.data.options` says of sequences."""

    length: int  # tokens that are predicted in a sequence
    separator: int | None  # the token after a document, which is its last; None: there is none
    padding: int | None  # a token that stands for none
    bytes_per_token: float | None  # of the text that the tokens stand for, on average


@dataclasses.dataclass(frozen=True, eq=False)
class Sequences:
    """The sequences of a split, by number.

    Attributes:
        parts: files, or arrays: of tokens one after the other, or (N, length + 1) of whole rows.
        length: see `Options`.
        dtype: of the tokens that are taken.
        kept: those that the split names, of all sequences of the parts.
    """

    parts: tuple[Part, ...]
    length: int
    dtype: np.dtype
    kept: range

    def __len__(self) -> int:
        return len(self.kept)

    def take(self, numbers: Sequence[int] | np.ndarray) -> np.ndarray:
        """The sequences of these numbers, each from 0: (B, length + 1)."""
        asked = np.asarray(numbers, np.int64)
        if asked.size and not 0 <= asked.min() <= asked.max() < len(self):
            raise IndexError(f"sequences {asked.min()} to {asked.max()} of {len(self)}")
        at = asked + self.kept.start
        rows = np.empty((len(at), self.length + 1), self.dtype)
        part_of = np.searchsorted(self._ends, at, side="right")
        for part in np.unique(part_of):
            mine = part_of == part
            before = self._ends[part - 1] if part else 0
            rows[mine] = _windows(self.parts[part], self.length)[at[mine] - before]
        return rows

    def read(self, record: int, epoch: int, position: int) -> tuple[Mapping[str, np.ndarray], str]:
        """One sequence, see `examples.Reader`; nothing is drawn at random."""
        return {"tokens": self.take([record])[0]}, ""

    @functools.cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum([_count(part, self.length) for part in self.parts])


def read_options(data: ConfigDict) -> Options:
    """What `data` (config.data) says of sequences.

    Raises:
        Mistake: if the length is missing, or a value is not allowed.
    """
    given = data.options.to_dict()
    unknown = sorted(given.keys() - set(OPTIONS))
    if unknown and not is_dotted(data.name):
        raise Mistake(
            f"config.data.options.{unknown[0]} is unknown; for tokens there are "
            f"{', '.join(OPTIONS)}."
        )
    length = given.get("length")
    if not _is_whole(length) or length < 1:
        raise Mistake(
            f"config.data.options.length is {'missing' if length is None else repr(length)}; it "
            "must be the tokens of a sequence, a whole number over 0 such as 256."
        )
    of_bytes = data.name in token_sources.OF_BYTES
    between = token_sources.END_OF_TEXT[0] if of_bytes else None
    ids = [given.get("separator", between), given.get("padding")]
    for key, token in zip(("separator", "padding"), ids, strict=True):
        if token is not None and not (_is_whole(token) and 0 <= token < data.num_classes):
            raise Mistake(
                f"config.data.options.{key} is {token!r}; it must be a token, 0 or more and below "
                f"config.data.num_classes, which is {data.num_classes}, or None for none."
            )
    size = given.get("bytes_per_token", 1.0 if of_bytes else None)
    if size is not None and not (isinstance(size, int | float) and 0 < size < 1e6):
        raise Mistake(
            f"config.data.options.bytes_per_token is {size!r}; it must be a number over 0, the "
            "bytes of text that a token stands for on average."
        )
    return Options(length, *ids, size)


def dtype_for(vocabulary: int) -> np.dtype:
    """The narrowest type of the tokens 0 to `vocabulary` - 1 that devices hold."""
    return np.dtype(np.uint8 if vocabulary <= 2**8 else
                    np.uint16 if vocabulary <= 2**16 else np.int32)


def open_sequences(data: ConfigDict) -> tuple[Sequences, Sequences]:
    """The sequences of both splits that `data` (config.data) names: (train, test).

    All tokens are read once to see that they are below `num_classes`, the vocabulary; what was
    found of a file is remembered.

    Raises:
        Mistake: if there are no such files or they are none of tokens, a token is outside of the
            vocabulary, there is not one sequence, or the numbers of them are not the config's.
    """
    options = read_options(data)
    names = {split: splits.name_of(split) for split in (data.train_split, data.test_split)}
    parts = token_sources.open_parts(
        data, list(dict.fromkeys(names.values())), options.length, options.separator)
    for part in [part for group in parts.values() for part in group]:
        _check_ids(part, data.num_classes)
    found, who = [], token_sources.describe(data)
    for key in ("train", "test"):
        split = data[f"{key}_split"]
        group = parts[names[split]]
        total = sum(_count(part, options.length) for part in group)
        if not total:
            tokens = max(_size(part) for part in group)
            raise Mistake(
                f"split {split!r} of {who} has no whole sequence: the longest of its files has "
                f"{tokens} tokens, and a sequence of config.data.options.length={options.length} "
                f"takes {options.length + 1}."
            )
        kept = splits.stretch(split, total)
        if data[f"{key}_examples"] != len(kept):
            raise Mistake(
                f"config.data.{key}_examples is {data[f'{key}_examples']} but split {split!r} of "
                f"{who} has {len(kept)} sequences of {options.length} tokens: set "
                f"--config.data.{key}_examples={len(kept)}."
            )
        found.append(Sequences(group, options.length, dtype_for(data.num_classes), kept))
    return found[0], found[1]


def _check_ids(part: Part, vocabulary: int) -> None:
    """Raises Mistake for a token that is not in the vocabulary."""
    if isinstance(part, TokenFile):
        least, most, who = 0, token_files.largest(part), part.path
    elif part.size:
        least, most, who = int(part.min()), int(part.max()), "the data"
    else:
        return
    if least < 0 or most >= vocabulary:
        raise Mistake(
            f"{who} has a token {most if most >= vocabulary else least}; all must lie in [0, "
            f"{vocabulary}), as config.data.num_classes, the vocabulary, is {vocabulary}."
        )


def _size(part: Part) -> int:
    return part.count if isinstance(part, TokenFile) else part.size


def _count(part: Part, length: int) -> int:
    """How many sequences a part has."""
    if isinstance(part, np.ndarray) and part.ndim == 2:
        return len(part)
    return max(0, (_size(part) - 1) // length)


def _windows(part: Part, length: int) -> np.ndarray:
    """All sequences of a part, (N, length + 1); no token is read or copied yet."""
    tokens = token_files.mapped(part) if isinstance(part, TokenFile) else part
    if tokens.ndim == 2:
        return tokens
    return np.lib.stride_tricks.sliding_window_view(tokens, length + 1)[::length]


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
