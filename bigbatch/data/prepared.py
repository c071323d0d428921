"""Opens TFDS data sets that were prepared as ArrayRecord files, and says what is wrong with them.

Their records are read without TensorFlow. Whatever is absent, cut short or empty is named by its
file, and is found when the data set is opened, as far as that can be seen without reading it all.
"""

import dataclasses
import difflib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePath
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from bigbatch.data import cifar, local_copy, splits
from bigbatch.mistake import Mistake
from bigbatch.storage import bucket

# Pillow's modes, by the number of channels that a TFDS image may have.
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
OPENED_AT_ONCE = 16  # files

Records = Sequence[Mapping[str, Any]]  # see `tfds_records`


@dataclasses.dataclass(frozen=True)
class Shards:
    """The records of a split by number; one that cannot be read is a RuntimeError with its file."""

    source: Any  # of TFDS
    files: tuple[str, ...]
    ends: np.ndarray  # the number of records up to the end of each file

    def __len__(self) -> int:
        return len(self.source)

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, record: int) -> Mapping[str, Any]:
        file = self.files[int(np.searchsorted(self.ends, record, side="right"))]
        try:
            example = self.source[record]
        except Exception as error:  # of ArrayRecord, protocol buffers or TFDS: each has its own
            raise RuntimeError(f"{file}: {one_line(error)}") from error
        for key in ("image", "label"):
            if example[key] is None:
                raise RuntimeError(f"{file}: the record has no {key}")
        return example

    def __getitems__(self, records: Sequence[int]) -> list[Mapping[str, Any]]:
        """The records of these numbers, faster than one by one."""
        try:
            examples = self.source.__getitems__(records)
            if all(example[key] is not None for example in examples for key in ("image", "label")):
                return examples
        except Exception:
            pass
        return [self[record] for record in records]  # which finds the one at fault


def open_tfds(data: ConfigDict) -> Any:
    """Opens the TFDS data set `data.name`, prepared as ArrayRecord files in `data.dir`.

    An absent data set is not prepared, as `tfds.data_source` would do. The data set's own code is
    not needed, since the folder's metadata describes the data set completely. Files in a bucket
    (gs://) are first copied, once; see `local_copy`.

    Returns:
        A read-only TFDS builder.

    Raises:
        Mistake: if the data set is unknown, not prepared, or prepared in another file format, with
            the command that prepares it; if a file that describes it is faulty; if it is not a data
            set of labelled images; or if its number of classes is not `data.num_classes`.
    """
    from tensorflow_datasets.core.read_only_builder import builder_from_files

    remote = bucket.in_bucket(data.dir)
    if "://" in data.dir and not remote:
        raise Mistake(
            f"config.data.dir is {data.dir!r}; it must be a folder of each host, or in a bucket: "
            "gs://BUCKET/PATH."
        )
    if remote:
        bucket.check(data.dir)
    folder = data_folder(data)
    try:
        builder = builder_from_files(data.name, data_dir=folder)
    except Exception as error:
        # TFDS has many errors for files that are faulty, and of some says that nothing is there.
        fault = _metadata_fault(data.name, folder)
        if not fault and not isinstance(error, ValueError):
            fault = f"{folder} cannot be read: {one_line(error)}"
        raise Mistake(fault or _not_prepared(data.name, folder)) from error
    formats = {file_format.value for file_format in builder.info.available_file_formats()}
    if "array_record" not in formats:
        raise Mistake(
            f"{data.name} in {builder.data_path} is prepared as {' and '.join(sorted(formats))}; "
            "only array_record can be read in any order and without TensorFlow. Prepare it again "
            "in another folder, and set --config.data.dir to that folder:\n"
            + _how_to_prepare(data.name, "FOLDER", str(folder / "downloads"))
        )
    _check_features(builder, data)
    if remote:
        return local_copy.bring_down(builder, (data.train_split, data.test_split))
    return builder


def data_folder(data: ConfigDict) -> Any:
    """The folder that `data.dir` names, or TFDS's own, as an epath.Path."""
    from etils import epath
    from tensorflow_datasets.core import constants

    return epath.Path(data.dir or constants.DATA_DIR).expanduser()


def tfds_records(builder: Any, name: str, split: str) -> Records:
    """Opens a split: its records by number, each with `image` (encoded bytes) and `label` (int).

    Args:
        builder: from `open_tfds`.
        name: of the data set, for messages.
        split: a TFDS split, such as 'train' or 'train[:90%]'.

    Raises:
        Mistake: if there is no such split, if it is empty, or if one of its files is absent, cut
            short, or has fewer records than it should.
    """
    import tensorflow_datasets as tfds

    try:
        examples = builder.info.splits[split].num_examples
        stretches = tfds.core.ReadInstruction.from_spec(split).to_absolute(builder.info.splits)
    except splits.NOT_OF_TFDS:
        raise Mistake(
            f"{name} has no split {split!r}; it has {', '.join(builder.info.splits)}, or a part "
            "of one, as 'train[:90%]'."
        ) from None
    # TFDS itself reads something else than nothing where a stretch ends before it begins.
    if not examples or any(
            part.to is not None and part.to < (part.from_ or 0) for part in stretches):
        raise Mistake(f"split {split!r} of {name} is empty.")
    files = builder.info.splits[split].file_instructions
    _check_shards(files, f"split {split!r} of {name}")
    return Shards(
        builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()}),
        tuple(os.fspath(file.filename) for file in files),
        np.cumsum([file.take for file in files]),
    )


def one_line(error: Exception) -> str:
    """The text of an error in one line. (ArrayRecord gives none for a file without its end.)"""
    return " ".join(str(error).split()) or "it is cut short or damaged"


def _check_shards(instructions: Sequence[Any], what: str) -> None:
    """Checks that each file of a split can be opened and has the records that it should have.

    To ArrayRecord's reader of records, a file cut to 64 KiB is one whose records are empty.
    """
    from array_record.python.array_record_module import ArrayRecordReader

    def fault(instruction: Any) -> str:
        file, expected = os.fspath(instruction.filename), instruction.examples_in_shard
        try:
            if not os.path.isfile(file):
                return f"{file} is absent"
            reader = ArrayRecordReader(file)
            found = reader.num_records()
            reader.close()
        except (OSError, RuntimeError) as error:
            return f"{file}: {one_line(error)}"
        if found != expected:
            return f"{file} has {found} records, and dataset_info.json says {expected}"
        return ""

    with ThreadPoolExecutor(OPENED_AT_ONCE) as threads:
        faults = [text for text in threads.map(fault, instructions) if text]
    if faults:
        more = f" (and {len(faults) - 1} more files are faulty)" if len(faults) > 1 else ""
        raise Mistake(
            f"{what} cannot be read: {faults[0]}{more}; copy or prepare it again.")


def _metadata_fault(name: str, folder: Any) -> str:
    """What is wrong with the files that describe the data set `name`; "" if nothing is.

    Args:
        name: as `config.data.name`: NAME, NAME:VERSION or NAME/CONFIG:VERSION.
        folder: the epath.Path that holds NAME.
    """
    from tensorflow_datasets.core.read_only_builder import builder_from_directory

    base, _, version = name.partition(":")
    if not re.fullmatch(r"\w+(/[\w.-]+)?", base):
        return ""
    described = ("features.json", "dataset_info.json")
    file, place = None, folder  # what was looked at last
    try:
        versions = sorted({
            file.parent for depth in ("*", "*/*") for json_name in described
            for file in (folder / base).glob(f"{depth}/{json_name}")
            if version in ("", file.parent.name)
        })
        for place in versions:
            for file in (place / json_name for json_name in described):
                if not file.exists():
                    return f"{file} is absent: copy or prepare the data set again."
                json.loads(file.read_text())
        file = None
        for place in versions:
            builder_from_directory(place)
    except Exception as error:
        where = f"{file} is no whole JSON file" if file else f"{place} cannot be opened"
        return f"{where} ({one_line(error)}): copy or prepare the data set again."
    return ""


def _check_features(builder: Any, data: ConfigDict) -> None:
    """Checks that a TFDS data set has uint8 images, and integer labels of the config's classes."""
    import tensorflow_datasets as tfds

    features = builder.info.features
    named = isinstance(features, tfds.features.FeaturesDict)
    image = features["image"] if named and "image" in features else None
    label = features["label"] if named and "label" in features else None
    if (
        not isinstance(image, tfds.features.Image)
        or image.np_dtype != np.uint8
        or image.shape[-1] not in MODES
        or label is None
        or label.shape != ()
        or not np.issubdtype(label.np_dtype, np.integer)
    ):
        has = re.sub(r"\s+", " ", repr(features))
        raise Mistake(
            f"{data.name} is no data set of labelled images: it must have the features 'image' (an "
            f"Image of type uint8) and 'label' (one whole number; other "
            f"labels are for a task of your own, docs/tasks.md), but it has {has}."
        )
    if isinstance(label, tfds.features.ClassLabel) and label.num_classes != data.num_classes:
        raise Mistake(
            f"config.data.num_classes is {data.num_classes} but {data.name} has "
            f"{label.num_classes} classes: set --config.data.num_classes={label.num_classes}."
        )


def _not_prepared(name: str, folder: PurePath) -> str:
    """The message for a TFDS data set that is not in `folder`."""
    import tensorflow_datasets as tfds

    base = re.split(r"[/:]", name)[0]
    # The folders are NAME/VERSION or NAME/CONFIG/VERSION, written NAME:VERSION in a config.
    versions = sorted(
        path.parent.relative_to(folder)
        for pattern in ("*/*/features.json", "*/*/*/features.json")
        for path in folder.glob(pattern)
    )
    prepared = ", ".join(f"{path.parent}:{path.name}" for path in versions)
    there = (f"prepared there: {prepared}" if prepared else
             "nothing is prepared there" if folder.exists() else "there is no such folder")
    known = tfds.list_builders(with_community_datasets=False)
    if base not in known:
        close = difflib.get_close_matches(base, ["digits", "folder", *known], n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        return (
            f"config.data.name is {name!r}; it must be 'digits', 'folder', the name of a TFDS data "
            f"set, or the dotted path of a function. TFDS has no data set of this name, and "
            f"{folder} has none either ({there}).{hint}"
        )
    archive = (f"Or put {cifar.ARCHIVES[name][0].packed}, from {cifar.HOME}, into it. "
               if name in cifar.ARCHIVES else "")
    return (
        f"{name} is not in {folder} ({there}). If it is elsewhere, set --config.data.dir to the "
        f"folder that holds {base}/. {archive}Otherwise prepare it once, in a separate Python "
        "environment:\n"
        + _how_to_prepare(name, str(folder))
    )


def _how_to_prepare(name: str, folder: str, downloads: str = "") -> str:
    """The two shell commands for it. `tfds build` would need more packages than TFDS installs."""
    reused = f"download_dir={downloads!r}" if downloads else ""
    return (
        "    python -m pip install tensorflow tensorflow-datasets array_record &&\n"
        f'    python -c "import tensorflow_datasets as tfds; tfds.builder({name!r}, '
        f"data_dir={folder!r}, file_format='array_record').download_and_prepare({reused})\""
    )
