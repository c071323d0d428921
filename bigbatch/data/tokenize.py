"""Makes a file of tokens out of text, with a tokenizer of Hugging Face's `tokenizers`.

    python -m bigbatch.data.tokenize --tokenizer=tokenizer.json --output=DIR/train.bin TEXT ...

TEXT is a .txt file, or a folder of them. Each file is a document, and so is what lies between two
separators written out in a file (as <|endoftext|>). The separator's token follows each document.
FILE.bin has the tokens as uint16, or as uint32 where the vocabulary is larger than 65 536, and
FILE.bin.json says what they are. It needs `pip install '.[text]'`.
"""

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bigbatch.data import token_files
from bigbatch.job import statuses
from bigbatch.mistake import Mistake

SEPARATOR = "<|endoftext|>"
READ_AT_ONCE = 2**22  # characters
AT_ONCE = 2**22  # characters of the documents that are tokenized in one call, about


def tokenize(
    tokenizer: Path, output: Path, texts: Sequence[Path], separator: str = SEPARATOR
) -> dict[str, Any]:
    """Writes the tokens of text files; the file takes its name when it is whole.

    A document is in memory as a whole, and nothing else is.

    Args:
        tokenizer: a tokenizer.json.
        output: the .bin file to write.
        texts: .txt files, and folders in which they lie at any depth.
        separator: the token after each document, as the tokenizer calls it.

    Returns:
        What is written beside the file: `dtype`, the number of `tokens`, of `documents` and of
        `bytes` of text, `vocabulary`, the `separator`'s token, and the `tokenizer`'s SHA-256.

    Raises:
        Mistake: if a file cannot be read or written, or is no tokenizer or no text in UTF-8; if
            the tokenizer does not know the separator, or there is no text.
    """
    if output.suffix != ".bin":
        raise Mistake(f"--output is {output}; its name must end in .bin.")
    if output.exists():
        raise Mistake(f"{output} is there already: take another name, or remove it.")
    known, content = _load(tokenizer)
    mark = known.token_to_id(separator)
    if mark is None:
        special = [token.content for token in known.get_added_tokens_decoder().values()]
        raise Mistake(
            f"--separator is {separator!r}, which {tokenizer} does not know; its special tokens "
            f"are {', '.join(special[:20]) or 'none'}."
        )
    files = _files(texts)
    vocabulary = max(known.get_vocab(with_added_tokens=True).values()) + 1
    dtype = np.dtype("<u2" if vocabulary <= 2**16 else "<u4")
    told = {
        "dtype": np.dtype(dtype).name, "tokens": 0, "documents": 0, "bytes": 0,
        "vocabulary": vocabulary, "separator": mark,
        "tokenizer": hashlib.sha256(content).hexdigest(),
    }
    unfinished = output.with_name(output.name + ".unfinished")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with unfinished.open("wb") as written:
            for group in _groups(documents(files, separator)):
                for text, found in zip(
                    group, known.encode_batch(group, add_special_tokens=False), strict=True):
                    written.write(np.array([*found.ids, mark], dtype).tobytes())
                    told["tokens"] += len(found.ids) + 1
                    told["documents"] += 1
                    told["bytes"] += len(text.encode())
            written.flush()
            os.fsync(written.fileno())
        if not told["tokens"]:
            raise Mistake(f"there is no text in {', '.join(map(str, texts))}.")
        beside = token_files.description_of(output)
        half = beside.with_name(beside.name + ".unfinished")
        half.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
        half.replace(beside)  # first, since without it the tokens could be misread
        unfinished.replace(output)
    except OSError as error:
        place = error.filename or output
        raise Mistake(f"{place} cannot be written ({error.strerror}).") from error
    finally:
        if unfinished.exists():
            unfinished.unlink()
    return told


def documents(files: Iterable[Path], separator: str) -> Iterator[str]:
    """The documents in text files, without those that are empty.

    Raises:
        Mistake: if a file cannot be read or is no text in UTF-8.
    """
    for path in files:
        begun = ""
        try:
            with path.open(encoding="utf-8", newline="") as opened:
                while piece := opened.read(READ_AT_ONCE):
                    *whole, begun = (begun + piece).split(separator)
                    yield from filter(None, whole)
        except UnicodeDecodeError as error:
            raise Mistake(f"{path} is no text in UTF-8 ({error.reason}).") from error
        except OSError as error:
            raise Mistake(f"{path} cannot be read ({error.strerror}).") from error
        if begun:
            yield begun


def _groups(texts: Iterable[str]) -> Iterator[list[str]]:
    """Texts in lists, each of about `AT_ONCE` characters."""
    group, size = [], 0
    for text in texts:
        group.append(text)
        size += len(text)
        if size >= AT_ONCE:
            yield group
            group, size = [], 0
    if group:
        yield group


def _load(path: Path) -> tuple[Any, bytes]:
    """The tokenizer in a file, and the file's content."""
    try:
        import tokenizers
    except ImportError:
        raise Mistake(
            "tokenizers is not installed, which reads the tokenizer: pip install tokenizers, or "
            "'.[text]' in a checkout.") from None
    try:
        content = path.read_bytes()
    except OSError as error:
        raise Mistake(f"--tokenizer: {path} cannot be read ({error.strerror}).") from error
    try:
        return tokenizers.Tokenizer.from_buffer(content), content
    except Exception as error:  # the library raises nothing narrower
        reason = " ".join(str(error).split())
        raise Mistake(f"--tokenizer: {path} is no tokenizer.json ({reason}).") from error


def _files(texts: Sequence[Path]) -> list[Path]:
    """The files, and those in folders, sorted by name in each folder."""
    found = []
    for path in texts:
        inside = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
        if not inside:
            raise Mistake(f"{path} has no .txt files.")
        found += inside
    return found


def main(arguments: Sequence[str]) -> None:
    """The command; a user's mistake is one line and status 2."""
    parser = argparse.ArgumentParser(
        prog="python -m bigbatch.data.tokenize",
        description="Makes a file of tokens out of text files.")
    parser.add_argument("texts", metavar="TEXT", type=Path, nargs="+",
                        help="a .txt file, or a folder of them")
    parser.add_argument("--tokenizer", type=Path, required=True, help="a tokenizer.json")
    parser.add_argument("--output", type=Path, required=True, help="the .bin file to write")
    parser.add_argument("--separator", default=SEPARATOR,
                        help="the token after each document (default: %(default)s)")
    given = parser.parse_args(arguments)
    try:
        told = tokenize(given.tokenizer, given.output, given.texts, given.separator)
    except Mistake as mistake:
        print(f"bigbatch: {mistake}", file=sys.stderr)
        sys.exit(statuses.MISTAKE)
    each = told["bytes"] / max(1, told["tokens"] - told["documents"])
    print(f"{given.output}: {told['tokens']} tokens of {told['documents']} documents; "
          f"config.data.num_classes={told['vocabulary']} or more, "
          f"data.options.separator={told['separator']}, data.options.bytes_per_token={each:.4f}")


if __name__ == "__main__":
    main(sys.argv[1:])
