"""Reads CIFAR-10 and CIFAR-100 from their original archives, packed or unpacked.

The archives for Python hold pickles. A pickle can name any function to be called, so they are read
by a reader that knows arrays of bytes and nothing else, and calls nothing of NumPy's.
"""

import io
import math
import pickle
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bigbatch.mistake import Mistake

HOME = "https://www.cs.toronto.edu/~kriz/cifar.html"
SIDE = 32
PIXELS = 3 * SIDE * SIDE  # bytes of an image: all of red, then green, then blue


class Archive(NamedTuple):
    """One form in which a data set is published."""

    packed: str  # the archive
    folder: str  # the folder in it
    train: tuple[str, ...]  # files in the folder
    test: tuple[str, ...]
    label: str | int  # the key of the pickled labels, or the place of the label byte...
    labels: int = 0  # ...of so many, in a binary record


BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
ARCHIVES = {
    "cifar10": (
        Archive("cifar-10-python.tar.gz", "cifar-10-batches-py", BATCHES, ("test_batch",),
                "labels"),
        Archive("cifar-10-binary.tar.gz", "cifar-10-batches-bin",
                tuple(f"{name}.bin" for name in BATCHES), ("test_batch.bin",), 0, 1),
    ),
    "cifar100": (
        Archive("cifar-100-python.tar.gz", "cifar-100-python", ("train",), ("test",),
                "fine_labels"),
        Archive("cifar-100-binary.tar.gz", "cifar-100-binary", ("train.bin",), ("test.bin",), 1, 2),
    ),
}
CLASSES = {"cifar10": 10, "cifar100": 100}


def find(name: str, folder: Path) -> tuple[Archive, Path] | None:
    """The archive of the data set `name` in `folder`, and where it is: unpacked before packed."""
    archives = ARCHIVES.get(name, ())
    for archive in archives:
        if (folder / archive.folder).is_dir():
            return archive, folder / archive.folder
    for archive in archives:
        if (folder / archive.packed).is_file():
            return archive, folder / archive.packed
    return None


def load(
    archive: Archive, path: Path
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Reads an archive that `find` found: (images, labels) of the training and of the test set.

    The images are uint8 (N, 32, 32, 3), in the order of the files.

    Raises:
        Mistake: if a file is absent or is not what it should be; the message names it.
    """
    files = (_unpacked if path.is_dir() else _packed)(archive, path)

    def joined(names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        parts = [_read(archive, files[name], f"{path}: {name}") for name in names]
        images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        upright = images.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)
        return np.ascontiguousarray(upright), labels

    return joined(archive.train), joined(archive.test)


def _unpacked(archive: Archive, path: Path) -> dict[str, bytes]:
    """The content of the files in a folder, by name."""
    try:
        return {name: (path / name).read_bytes() for name in archive.train + archive.test}
    except OSError as error:
        raise Mistake(
            f"{error.filename} cannot be read ({error.strerror}): unpack {archive.packed} again."
        ) from error


def _packed(archive: Archive, path: Path) -> dict[str, bytes]:
    """The content of the files in a .tar.gz, by name; nothing is written to the disk."""
    again = f"download it again, from {HOME}."
    files: dict[str, bytes] = {}
    wanted = {f"{archive.folder}/{name}": name for name in archive.train + archive.test}
    try:
        with tarfile.open(path) as packed:
            for member in packed:
                name = wanted.get(member.name.removeprefix("./"))
                if name and member.isfile():
                    files[name] = packed.extractfile(member).read()
    except Exception as error:  # of tarfile, gzip, zlib or the disk
        raise Mistake(f"{path} is no whole archive ({_text(error)}): {again}") from error
    absent = [inside for inside, name in wanted.items() if name not in files]
    if absent:
        raise Mistake(f"{path} has no file {absent[0]}: {again}")
    return files


def _read(archive: Archive, content: bytes, what: str) -> tuple[np.ndarray, np.ndarray]:
    """The images (N, 3072) and labels (N,) of one file."""
    if archive.labels:
        size = archive.labels + PIXELS
        if not content or len(content) % size:
            raise Mistake(
                f"{what} has {len(content)} bytes, which are no whole number of records of {size} "
                f"bytes: unpack or download {archive.packed} again."
            )
        records = np.frombuffer(content, np.uint8).reshape(-1, size)
        return records[:, archive.labels :], records[:, archive.label].astype(np.int32)
    try:
        found = _Arrays(io.BytesIO(content), encoding="bytes").load()
        images = found[b"data"].array()
        labels = np.asarray(found[archive.label.encode()])
        if images.shape != (len(labels), PIXELS) or labels.dtype.kind != "i":
            raise ValueError(f"images of shape {images.shape} and {len(labels)} labels")
    except Exception as error:  # a pickle that is cut short can raise any of many
        raise Mistake(
            f"{what} is no batch of images and labels ({_text(error)}): unpack or download "
            f"{archive.packed} again."
        ) from error
    return images, labels.astype(np.int32)


class _Type:
    """What a pickle has for a NumPy dtype."""

    def __init__(self, code: bytes, *_: Any):
        self.code = code

    def __setstate__(self, state: Any):
        pass  # the byte order and such, of which bytes have none


class _Array:
    """What a pickle has for a NumPy array."""

    state: tuple = ()

    def __setstate__(self, state: tuple):
        self.state = state

    def array(self) -> np.ndarray:
        """The array; a ValueError if it is not one of bytes."""
        _, shape, kind, column_first, content = self.state
        if kind.code != b"u1" or column_first or len(content) != math.prod(shape):
            raise ValueError("no whole array of bytes")
        return np.frombuffer(content, np.uint8).reshape(shape)


class _Arrays(pickle.Unpickler):
    """Reads arrays of bytes, numbers, texts, lists and dicts, and refuses all else."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return _empty
        if module == "numpy" and name in ("ndarray", "dtype"):
            return _Array if name == "ndarray" else _Type
        raise pickle.UnpicklingError(f"it wants to call {module}.{name}")


def _empty(*_: Any) -> _Array:
    return _Array()


def _text(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
