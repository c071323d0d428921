"""Where tokens come from: Python's standard library, text files, token files, a function.

Text is taken as bytes, so its vocabulary is 256, and is read whole; a single text file and token
files are mapped into memory.
"""

import hashlib
import platform
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from bigbatch.data import token_files
from bigbatch.data.token_files import TokenFile
from bigbatch.dotted import is_dotted, resolve
from bigbatch.mistake import Mistake

# As config.data.name: the source text of Python's standard library, .txt files, token files.
STDLIB, TEXT, TOKENS = "stdlib", "text", "tokens"
OF_BYTES = (STDLIB, TEXT)
END_OF_TEXT = b"\0"  # between the files of a text
EVERY = 10  # of the standard library's files, so many make one that is for testing

Part = TokenFile | np.ndarray  # an array of tokens one after the other, or of sequences


def open_parts(
    data: ConfigDict, names: Sequence[str], length: int, separator: int | None
) -> dict[str, tuple[Part, ...]]:
    """The files or arrays of each part of the data set, by its name.

    Args:
        data: config.data.
        names: of the parts, such as train and test.
        length: of a sequence; see `tokens.Options`, also for the separator.
        separator: the token after a document, or None.

    Raises:
        Mistake: if there are no such parts, or they are none of tokens.
    """
    if is_dotted(data.name):
        return _from_function(data, names, length)
    if data.name == STDLIB:
        stated, running = data.options.get("python"), platform.python_version()
        if stated not in (None, running):
            raise Mistake(
                f"config.data.options.python is {stated!r}, and this is Python {running}, whose "
                f"standard library is another text: run it with {stated}, or set the key to "
                f"{running} in a new workdir."
            )
        there = standard_library()
        wrong = [name for name in names if name not in there]
        if wrong:
            raise Mistake(f"{STDLIB} has no split {wrong[0]!r}; it has train, test, or a part of "
                          "one, as 'train[:90%]'.")
        return {name: _joined(there[name]) for name in names}
    if data.name not in (TEXT, TOKENS):
        raise Mistake(
            f"config.data.name is {data.name!r}; for tokens it must be {STDLIB}, {TEXT}, {TOKENS}, "
            "or the dotted path of a function."
        )
    return {name: _in_folder(data, name, separator) for name in names}


def standard_library() -> dict[str, list[Path]]:
    """The modules of Python's standard library at the top of its folder, for `train` and `test`.

    They are those that every installation of this version of Python has, sorted by name; every
    tenth is for testing.

    Raises:
        Mistake: if their source is not installed.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    files = sorted(path for path in folder.glob("*.py") if path.stem in sys.stdlib_module_names)
    if len(files) < EVERY:
        raise Mistake(
            f"{folder} has no source of Python's standard library: set --config.data.name={TEXT} "
            "and --config.data.dir to a folder with text of your own."
        )
    return {"train": [path for number, path in enumerate(files) if number % EVERY != EVERY - 1],
            "test": files[EVERY - 1 :: EVERY]}


def about(data: ConfigDict) -> dict[str, Any]:
    """What tells a text of the standard library from that of another version; {} for other data."""
    if data.name != STDLIB:
        return {}
    parts = standard_library()
    content = {name: END_OF_TEXT.join(path.read_bytes() for path in files)
               for name, files in parts.items()}
    return {
        "python": platform.python_version(),
        **{f"{name}_bytes": len(text) for name, text in content.items()},
        **{f"{name}_sha256": hashlib.sha256(text).hexdigest() for name, text in content.items()},
    }


def describe(data: ConfigDict) -> str:
    """The data set in a word, for messages."""
    return data.dir if data.name in (TEXT, TOKENS) else data.name


def _in_folder(data: ConfigDict, name: str, separator: int | None) -> tuple[Part, ...]:
    """The files `data.dir`/name, with one of their endings or as a folder of them."""
    endings = (".txt",) if data.name == TEXT else token_files.ENDINGS
    if not data.dir or "://" in data.dir:
        raise Mistake(
            f"config.data.dir is {data.dir!r}; as config.data.name is {data.name!r}, it must be a "
            f"folder of each host with the splits: files or folders of files *{endings[0]}."
        )
    root = Path(data.dir).expanduser()
    places = [root / name, *(root / f"{name}{ending}" for ending in endings)]
    place = next((place for place in places if place.exists()), None)
    if place is None:
        raise Mistake(
            f"there is no {' or '.join(map(str, places))}: set --config.data.dir to a folder with "
            "them, or --config.data.train_split and test_split to what is there."
        )
    files = [place] if place.is_file() else sorted(
        path for path in place.rglob("*") if path.suffix in endings and path.is_file())
    if not files or files[0].suffix not in endings:
        raise Mistake(f"{place} has no files *{' or *'.join(endings)}, as config.data.name="
                      f"{data.name} needs.")
    if data.name == TEXT:
        return _joined(files)
    return tuple(
        token_files.open_file(path, data.options.get("dtype"), data.num_classes, separator)
        for path in files)


def _joined(files: Sequence[Path]) -> tuple[Part, ...]:
    """The bytes of text files, one after the other with END_OF_TEXT between; one file as it is."""
    try:
        if len(files) == 1 and files[0].stat().st_size:
            return (TokenFile(str(files[0]), "|u1", 0, files[0].stat().st_size),)
        content = END_OF_TEXT.join(path.read_bytes() for path in files)
    except OSError as error:
        raise Mistake(f"{error.filename} cannot be read ({error.strerror}).") from error
    return (np.frombuffer(content, np.uint8),)


def _from_function(
    data: ConfigDict, names: Sequence[str], length: int
) -> dict[str, tuple[np.ndarray, ...]]:
    """Calls the user's function, which returns the tokens for training and for testing."""
    found = resolve(data.name, "config.data.name")(data)
    if isinstance(found, Mapping) and set(found) == {"train", "test"}:
        found = (found["train"], found["test"])
    if not isinstance(found, tuple | list) or len(found) != 2:
        raise Mistake(
            f"{data.name} returned a {type(found).__name__}; it must return two arrays of tokens, "
            "for training and for testing, in this order or as a dict of train and test."
        )
    parts = dict(zip(("train", "test"), found, strict=True))
    for key, tokens in parts.items():
        whole = isinstance(tokens, np.ndarray) and tokens.dtype.kind in "iu"
        rows = whole and tokens.ndim == 2 and tokens.shape[1] == length + 1
        if not whole or not (tokens.ndim == 1 or rows):
            got = (f"{tokens.dtype} of shape {tokens.shape}" if isinstance(tokens, np.ndarray)
                   else f"a {type(tokens).__name__}")
            raise Mistake(
                f"{data.name}: the tokens for {key}ing are {got}; they must be a NumPy array of "
                "whole numbers, (tokens,) or (sequences, config.data.options.length + 1)."
            )
    wrong = [name for name in names if name not in parts]
    if wrong:
        raise Mistake(f"{data.name} has no split {wrong[0]!r}; it has train, test, or a part of "
                      "one, as 'train[:90%]'.")
    return {name: (parts[name],) for name in names}
