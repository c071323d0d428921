"""Makes ArrayRecord files of a folder of class folders, without TensorFlow.

    python -m bigbatch.data.pack PHOTOS DIR NAME

A million small files are slow to read over a network, and cannot be read from a bucket. This writes
what is in PHOTOS/train/, PHOTOS/test/ and so on into a few large files, DIR/NAME/1.0.0/, as TFDS
would: the bytes of the images as they are, their labels, and their files' names. They are the same
records in the same order as those of the folder, so runs of both have the same curve.
"""

import argparse
import json
import os
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bigbatch.data import folder
from bigbatch.job import statuses
from bigbatch.mistake import Mistake

VERSION = "1.0.0"
SHARD_BYTES = 256_000_000  # about so many in a file
TRAIN = "train"
KINDS = "tensorflow_datasets.core.features"
SHARD = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"


def pack(source: Path, target: Path, name: str, shard_bytes: int = SHARD_BYTES) -> dict[str, Any]:
    """Writes the data set `name` into `target`; it takes its name there when it is whole.

    Args:
        source: the folder that holds train/ and other folders, each with a folder for each class.
        target: the folder that will be config.data.dir.
        name: of the data set, as config.data.name.
        shard_bytes: bytes of a file, about.

    Returns:
        What the config needs to know: the number of classes, and the examples of each split.

    Raises:
        Mistake: if the folder is no such folder, the data set is there already, or a file cannot
            be read or written.
    """
    if not re.fullmatch(r"[a-z]\w*", name):
        raise Mistake(f"the name {name!r} must be of small letters, digits and underscores.")
    if not (source / TRAIN).is_dir():
        raise Mistake(f"there is no folder {source / TRAIN}; the classes are the folders in it.")
    place = target / name / VERSION
    if place.exists():
        raise Mistake(f"{place} is there already: take another name, or remove it.")
    names = sorted(path.name for path in source.iterdir()
                   if path.is_dir() and not path.name.startswith("."))
    classes, parts = folder.open_parts(source, TRAIN, dict.fromkeys(names, ""))
    unfinished = place.with_name(VERSION + ".unfinished")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)  # of a call that was killed
        unfinished.mkdir(parents=True)
        lengths = {
            part: _write(files, unfinished, f"{name}-{part}.array_record", shard_bytes)
            for part, files in parts.items()
        }
        _describe(unfinished, name, classes, lengths)
        unfinished.rename(place)
    except (OSError, RuntimeError) as error:
        raise Mistake(f"{source} cannot be packed into {place}: {error}") from error
    return {"num_classes": len(classes), "splits": {p: sum(n) for p, n in lengths.items()}}


def _write(files: folder.Files, place: Path, stem: str, shard_bytes: int) -> list[int]:
    """Writes the files of a split, and returns the number of records in each."""
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.proto import tf_example_pb2

    size = sum(os.stat(os.path.join(files.root, os.fsdecode(bytes(p)))).st_size
               for p in files.paths)
    shards = max(1, min(len(files), round(size / shard_bytes)))
    ends = [len(files) * shard // shards for shard in range(shards + 1)]
    for shard, (start, end) in enumerate(zip(ends, ends[1:], strict=False)):
        writer = ArrayRecordWriter(
            os.fspath(place / f"{stem}-{shard:05}-of-{shards:05}"), "group_size:1")
        for record in range(start, end):
            found = files[record]
            example = tf_example_pb2.Example()
            features = example.features.feature
            features["image"].bytes_list.value.append(found["image"])
            features["label"].int64_list.value.append(found["label"])
            features["file_name"].bytes_list.value.append(os.fsencode(found["file_name"]))
            writer.write(example.SerializeToString())
        writer.close()
    return [end - start for start, end in zip(ends, ends[1:], strict=False)]


def _describe(
    place: Path, name: str, classes: Sequence[str], lengths: dict[str, list[int]]
) -> None:
    """Writes the files that say what the records are, as TFDS does."""
    features = {
        "image": {
            "pythonClassName": f"{KINDS}.image_feature.Image",
            "image": {"dtype": "uint8", "shape": {"dimensions": ["-1", "-1", "3"]}},
        },
        "label": {
            "pythonClassName": f"{KINDS}.class_label_feature.ClassLabel",
            "classLabel": {"numClasses": str(len(classes))},
        },
        "file_name": {"pythonClassName": f"{KINDS}.text_feature.Text", "text": {}},
    }
    (place / "features.json").write_text(json.dumps({
        "pythonClassName": f"{KINDS}.features_dict.FeaturesDict",
        "featuresDict": {"features": features},
    }, indent=2))
    (place / "label.labels.txt").write_text("".join(f"{name}\n" for name in classes))
    sizes = {part: sum(file.stat().st_size for file in place.glob(f"{name}-{part}.array_record-*"))
             for part in lengths}
    (place / "dataset_info.json").write_text(json.dumps({
        "name": name, "version": VERSION, "fileFormat": "array_record",
        "splits": [
            {"name": part, "numBytes": str(sizes[part]),
             "shardLengths": [str(length) for length in shards], "filepathTemplate": SHARD}
            for part, shards in lengths.items()
        ],
    }, indent=2))


def main(arguments: Sequence[str]) -> None:
    """The command; a user's mistake is one line and status 2."""
    parser = argparse.ArgumentParser(
        prog="python -m bigbatch.data.pack",
        description="Makes ArrayRecord files, DIR/NAME, of a folder of class folders of images.")
    parser.add_argument("photos", metavar="PHOTOS", type=Path,
                        help="the folder that holds train/, test/ ..., with a folder a class")
    parser.add_argument("dir", metavar="DIR", type=Path, help="what will be config.data.dir")
    parser.add_argument("name", metavar="NAME", help="what will be config.data.name")
    given = parser.parse_args(arguments)
    try:
        found = pack(given.photos, given.dir, given.name)
    except Mistake as mistake:
        print(f"bigbatch: {mistake}", file=sys.stderr)
        sys.exit(statuses.MISTAKE)
    examples = ", ".join(f"{part} {count}" for part, count in found["splits"].items())
    print(f"config.data.name={given.name}, dir={given.dir}, num_classes={found['num_classes']}; "
          f"examples: {examples}")


if __name__ == "__main__":
    main(sys.argv[1:])
