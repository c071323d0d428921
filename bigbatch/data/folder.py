"""Opens a folder of class folders of JPEG or PNG files, as the records of a data set.

    DIR/train/cat/1.jpg   DIR/train/dog/2.png   DIR/test/cat/3.jpg   ...

The records come in an order that follows from the files' names and looks random, so that a stretch
such as 'train[:90%]' holds images of all classes. One more file does not change the order of the
others.
"""

import dataclasses
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from bigbatch.data import splits
from bigbatch.mistake import Mistake

NAME = "folder"  # as config.data.name
READ = (".jpg", ".jpeg", ".png")
# Images that are not read. Other files, as notes and lists, are no images and are passed over.
NOT_READ = (".gif", ".bmp", ".webp", ".tif", ".tiff", ".jp2", ".heic", ".avif")


@dataclasses.dataclass(frozen=True)
class Files:
    """The records of a split by number; a file that cannot be read is a RuntimeError."""

    root: str
    paths: np.ndarray  # below the root, encoded; one array, which is soon sent to another process
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.paths)

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, record: int) -> Mapping[str, Any]:
        name = os.fsdecode(bytes(self.paths[record]))
        try:
            content = Path(self.root, name).read_bytes()
        except OSError as error:
            raise RuntimeError(f"{self.root}/{name}: {error.strerror}") from error
        return {"image": content, "label": int(self.labels[record]), "file_name": name}

    def __getitems__(self, records: Sequence[int]) -> list[Mapping[str, Any]]:
        return [self[record] for record in records]


def open_files(data: ConfigDict) -> tuple[Files, Files]:
    """Opens both splits that `data` (config.data) names: folders in `data.dir`, or parts of them.

    The classes are the folders in the folder of the training split, by name.

    Raises:
        Mistake: if there is no such folder, it has no class folders, or these do not agree with the
            config or with one another.
    """
    if not data.dir or "://" in data.dir:
        raise Mistake(
            f"config.data.dir is {data.dir!r}; as config.data.name is {NAME!r}, it must be a "
            "folder of each host that holds train/ and test/, with a folder for each class in them."
        )
    root = Path(data.dir).expanduser()
    trained = splits.name_of(data.train_split)
    keys = {trained: "train_split"}
    keys.setdefault(splits.name_of(data.test_split), "test_split")
    classes, parts = open_parts(root, trained, keys)
    if len(classes) != data.num_classes:
        raise Mistake(
            f"config.data.num_classes is {data.num_classes} but {root / trained} has "
            f"{len(classes)} class folders: set --config.data.num_classes={len(classes)}."
        )

    def stretch(split: str) -> Files:
        whole = parts[splits.name_of(split)]
        kept = splits.stretch(split, len(whole))
        rows = slice(kept.start, kept.stop)
        return Files(whole.root, whole.paths[rows], whole.labels[rows])

    return stretch(data.train_split), stretch(data.test_split)


def open_parts(
    root: Path, trained: str, keys: Mapping[str, str]
) -> tuple[list[str], dict[str, Files]]:
    """The names of the classes, and the records in each of some folders in `root`, whole.

    Args:
        root: the folder that holds these folders.
        trained: the one whose folders are the classes.
        keys: by the name of each of them, the key of config.data to change if it is not there.

    Raises:
        Mistake: see `open_files`.
    """
    found = {name: _classes(root, name, key) for name, key in keys.items()}
    classes = list(found[trained])
    for name, images in found[trained].items():
        if not images:
            raise Mistake(f"{root / trained / name} has no JPEG or PNG files: add some, or remove "
                          "it.")
    numbers = {name: number for number, name in enumerate(classes)}
    parts = {}
    for part, images in found.items():
        unknown = sorted(images.keys() - numbers.keys())
        if unknown:
            raise Mistake(
                f"{root / part / unknown[0]} is the folder of a class that {root / trained} "
                f"does not have: the classes are the folders in {trained}/."
            )
        rows = sorted(
            (hashlib.blake2b(path, digest_size=8).digest(), path, numbers[name])
            for name, paths in images.items() for path in paths
        )
        if not rows:
            raise Mistake(f"{root / part} has no JPEG or PNG images in its class folders.")
        parts[part] = Files(
            os.fspath(root / part), np.array([path for _, path, _ in rows]),
            np.array([label for *_, label in rows], np.int32),
        )
    return classes, parts


def _classes(root: Path, name: str, key: str) -> dict[str, list[bytes]]:
    """The images of each class in the folder of a split, as encoded paths below this folder."""
    folder = root / name
    if not folder.is_dir():
        there = sorted(path.name for path in root.glob("*/")) if root.is_dir() else []
        raise Mistake(
            f"there is no folder {folder}; "
            + (f"{root} holds {', '.join(there[:20])}: set --config.data.{key} to one of them."
               if there else "set --config.data.dir to the folder that holds train/ and test/.")
        )
    classes = sorted(path.name for path in folder.iterdir()
                     if path.is_dir() and not _hidden(path.name))
    if not classes:
        raise Mistake(
            f"{folder} has no class folders; it must have one folder for each class, with its "
            "JPEG or PNG files."
        )
    return {name: _images(folder, name) for name in classes}


def _images(folder: Path, name: str) -> list[bytes]:
    """The encoded paths below `folder` of all images in its folder `name`, at any depth.

    A link to a folder that it lies in is passed over.
    """
    top = os.path.join(folder, name)
    # Of each place the folder that it is and those above.
    above = [Path(os.path.realpath(place)) for place in (top, folder)]
    paths, around = [], {top: {os.fspath(one) for real in above for one in (real, *real.parents)}}
    for place, folders, files in os.walk(top, followlinks=True):
        inside = around.pop(place)
        below = {inner: os.path.realpath(os.path.join(place, inner)) for inner in folders}
        folders[:] = [inner for inner in folders
                      if not _hidden(inner) and below[inner] not in inside]
        around |= {os.path.join(place, inner): inside | {below[inner]} for inner in folders}
        for file in files:
            ending = os.path.splitext(file)[1].lower()
            path = os.path.join(place, file)
            if _hidden(file):
                continue
            if ending in READ:
                paths.append(os.fsencode(os.path.relpath(path, folder)))
            elif ending in NOT_READ:
                raise Mistake(
                    f"{path} is no JPEG or PNG file, and no others are read: convert or remove it."
                )
    return paths


def _hidden(name: str) -> bool:
    return name.startswith((".", "__MACOSX"))
