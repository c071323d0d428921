"""Files of tokens: what is in one, and the JSON file beside it that says so.

FILE.bin has the tokens one after the other as uint16 or uint32, little-endian, and nothing else;
FILE.bin.json may be beside it (`bigbatch.data.tokenize` writes both). FILE.npy is NumPy's, one
array of one axis.
"""

import functools
import hashlib
import json
import mmap
import os
from pathlib import Path
from tokenize import TokenError  # of Python's own module
from typing import Any, NamedTuple

import numpy as np

from bigbatch.mistake import Mistake
from bigbatch.storage import caches

ENDINGS = (".bin", ".npy")
DTYPES = ("uint8", "uint16", "uint32")
# What the JSON file beside a .bin file says of it.
DESCRIBED = {"dtype": str, "tokens": int, "vocabulary": int, "separator": int | None}
READ_AT_ONCE = 2**23  # bytes


class TokenFile(NamedTuple):
    """Tokens that lie one after the other in a file."""

    path: str
    dtype: str  # NumPy's code, with the order of the bytes
    offset: int  # of the first token, in bytes
    count: int  # of the tokens


def open_file(
    path: Path, dtype: str | None, vocabulary: int, separator: int | None
) -> TokenFile:
    """Finds out what is in a file; its tokens are not read.

    Args:
        path: of a .bin or .npy file.
        dtype: of a .bin file, as config.data.options says; None if it does not.
        vocabulary: config.data.num_classes.
        separator: as config.data.options says.

    Raises:
        Mistake: if the file is empty or is none of tokens, or what the file beside it says does not
            agree with it or with the config.
    """
    try:
        size = path.stat().st_size
        if not size:
            raise Mistake(f"{path} is empty: make it again, or remove it.")
        if path.suffix == ".npy":
            return _numpys(path, size)
        told = read_description(path)
    except OSError as error:
        raise Mistake(f"{path} cannot be read ({error.strerror}).") from error
    if dtype is not None and told.get("dtype", dtype) != dtype:
        raise Mistake(
            f"config.data.options.dtype is {dtype!r}, but by {description_of(path)} {path.name} "
            f"holds {told['dtype']}: leave the key out."
        )
    dtype = told.get("dtype", dtype or "uint16")
    if dtype not in DTYPES:
        raise Mistake(f"config.data.options.dtype is {dtype!r}; allowed are {', '.join(DTYPES)}.")
    each = np.dtype(dtype).itemsize
    if size % each:
        raise Mistake(
            f"{path} has {size} bytes, which are no whole number of tokens of {dtype}: set "
            "--config.data.options.dtype, or make the file again."
        )
    _check_description(path, told, size // each, vocabulary, separator)
    return TokenFile(str(path), np.dtype(dtype).newbyteorder("<").str, 0, size // each)


def description_of(path: Path) -> Path:
    """The file beside a .bin file that says what is in it."""
    return path.with_name(path.name + ".json")


def read_description(path: Path) -> dict[str, Any]:
    """What is said beside a .bin file; {} if there is nothing.

    Raises:
        Mistake: if what is there cannot be read.
    """
    beside = description_of(path)
    if not beside.exists():
        return {}
    try:
        told = json.loads(beside.read_text(encoding="utf-8"))
    except ValueError:
        told = None
    if not isinstance(told, dict) or not all(
            isinstance(told[key], kind) for key, kind in DESCRIBED.items() if key in told):
        raise Mistake(f"{beside} is no JSON of what {path.name} holds: make both again.")
    return told


def largest(file: TokenFile) -> int:
    """The largest token of a file, which is read in pieces once; the result is remembered."""
    status = os.stat(file.path)
    key = json.dumps([os.path.realpath(file.path), status.st_size, status.st_mtime_ns, file.dtype])
    remembered = Path(caches.folder("tokens"), hashlib.sha256(key.encode()).hexdigest()[:32])
    try:
        return int(remembered.expanduser().read_text())
    except (OSError, ValueError, RuntimeError):  # RuntimeError: a user without a home
        pass
    most, each = 0, np.dtype(file.dtype).itemsize
    buffer = np.empty(READ_AT_ONCE // each, file.dtype)
    try:
        with open(file.path, "rb", buffering=0) as opened:
            opened.seek(file.offset)
            left = file.count * each
            while left:
                piece = memoryview(buffer).cast("B")[: min(left, READ_AT_ONCE)]
                filled = 0
                while filled < len(piece):
                    got = opened.readinto(piece[filled:])
                    if not got:
                        raise Mistake(f"{file.path} has become shorter while it was read.")
                    filled += got
                most = max(most, int(buffer[: filled // each].max()))
                left -= filled
    except OSError as error:
        raise Mistake(f"{file.path} cannot be read ({error.strerror}).") from error
    _remember(remembered, most)
    return most


@functools.cache  # each file is mapped once, in each process that reads it
def mapped(file: TokenFile) -> np.ndarray:
    """The tokens of a file, of which the disk is read where they are taken and nowhere else.

    Raises:
        Mistake: if the file cannot be read any more.
    """
    try:
        with open(file.path, "rb") as opened:
            size = os.fstat(opened.fileno()).st_size
            if size < file.offset + file.count * np.dtype(file.dtype).itemsize:
                raise Mistake(f"{file.path} has become shorter since the run began.")
            whole = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise Mistake(f"{file.path} cannot be read ({error.strerror}).") from error
    if hasattr(mmap, "MADV_RANDOM"):  # or the kernel reads 128 KB around each sequence
        whole.madvise(mmap.MADV_RANDOM)
    return np.frombuffer(whole, file.dtype, file.count, file.offset)


def _remember(place: Path, most: int) -> None:
    """Keeps a result for the next start, where there is a place for it."""
    try:
        place = place.expanduser()
        place.parent.mkdir(parents=True, exist_ok=True)
        unfinished = place.with_name(f"{place.name}.{os.getpid()}.unfinished")
        unfinished.write_text(str(most))
        unfinished.replace(place)
    except (OSError, RuntimeError):
        pass


def _numpys(path: Path, size: int) -> TokenFile:
    """The tokens of a .npy file."""
    try:
        with path.open("rb") as opened:
            version = np.lib.format.read_magic(opened)
            read = (np.lib.format.read_array_header_1_0 if version == (1, 0)
                    else np.lib.format.read_array_header_2_0)
            shape, _, dtype = read(opened)
            offset = opened.tell()
    except (ValueError, SyntaxError, TokenError) as error:
        raise Mistake(f"{path} is no .npy file of NumPy's: make it again.") from error
    if len(shape) != 1 or dtype.newbyteorder("=").name not in DTYPES or dtype.hasobject:
        raise Mistake(
            f"{path} holds {dtype} of shape {shape}; tokens must be {', '.join(DTYPES[:-1])} or "
            f"{DTYPES[-1]}, with one axis."
        )
    if size < offset + shape[0] * dtype.itemsize:
        raise Mistake(f"{path} is cut short: it has {size} bytes and says that it holds {shape[0]} "
                      f"tokens of {dtype}.")
    if shape[0] <= 0:
        raise Mistake(f"{path} is empty: make it again, or remove it.")
    return TokenFile(str(path), dtype.str, offset, shape[0])


def _check_description(
    path: Path, told: dict[str, Any], count: int, vocabulary: int, separator: int | None
) -> None:
    """Raises Mistake where what is said beside a file does not agree with it or with the config."""
    if told.get("tokens", count) != count:
        raise Mistake(
            f"{path} has {count} tokens, and by {description_of(path).name} there must be "
            f"{told['tokens']}: make both again."
        )
    if told.get("vocabulary", 0) > vocabulary:
        raise Mistake(
            f"config.data.num_classes is {vocabulary}, but the tokenizer of {path} has a "
            f"vocabulary of {told['vocabulary']}: set --config.data.num_classes="
            f"{told['vocabulary']} or more."
        )
    if told.get("separator", separator) != separator:
        raise Mistake(
            f"config.data.options.separator is {separator}, but documents in {path} end with the "
            f"token {told['separator']}: set --config.data.options.separator={told['separator']}."
        )
