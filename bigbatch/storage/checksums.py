"""The checksums of a checkpoint's files, of which the list is written last."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FILE = "checksums.json"
_THREADS = min(8, os.cpu_count() or 1)


def of(files: Iterable[Path], folder: Path) -> dict[str, str]:
    """The SHA-256 of files, by their paths in `folder`."""
    files = sorted(files)
    with ThreadPoolExecutor(_THREADS) as pool:
        digests = pool.map(digest, files)
        return {str(file.relative_to(folder)): one
                for file, one in zip(files, digests, strict=True)}


def digest(file: Path) -> str:
    """The SHA-256 of a file."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def listing(files: Mapping[str, str]) -> str:
    """The text of checksums.json for {file: SHA-256}, with a checksum of the list itself."""
    own = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    return json.dumps({"files": files, "of_this_list": own}, indent=1) + "\n"


def listed(text: str) -> dict[str, str]:
    """{file: SHA-256} of the text of a checksums.json.

    Raises:
        ValueError: if it is damaged.
    """
    try:
        files: dict[str, str] = json.loads(text)["files"]
        if text != listing(files):
            raise ValueError
    except (KeyError, TypeError):
        raise ValueError from None
    return files


def faults(
    path: Path, read: Callable[[Path], bytes] = Path.read_bytes,
    digest: Callable[[Path], str] = digest, share: tuple[int, int] = (0, 1),
) -> list[str]:
    """The faults of the files of the checkpoint `path`, one text a file; [] if there are none.

    Args:
        path: of the checkpoint.
        read: returns the content of a file, which need not be on this machine's disk. It and
            `digest` raise a FileNotFoundError if there is no such file.
        digest: returns the SHA-256 of a file.
        share: (which, of how many) of about equal shares of the files to look at.
    """
    try:
        files = listed(read(path / FILE).decode())
    except FileNotFoundError:
        return [f"{path / FILE} is missing"]
    except ValueError:
        return [f"{path / FILE} is damaged"]

    def fault(name: str) -> str:
        try:
            if digest(path / name) != files[name]:
                return f"{path / name} is damaged (its checksum differs)"
        except (FileNotFoundError, IsADirectoryError):
            return f"{path / name} is missing"
        except OSError as error:
            return f"{path / name} cannot be read: {error.strerror or error}"
        return ""

    which, count = share
    with ThreadPoolExecutor(_THREADS) as pool:
        return [text for text in pool.map(fault, sorted(files)[which::count]) if text]
