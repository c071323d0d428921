"""Opens data sets: scikit-learn's digits, a TFDS data set, or the arrays of a user's function.

TFDS data sets are read without TensorFlow, from ArrayRecord files that were prepared beforehand.
`load` decodes a whole data set, for device memory; `open_records` opens one to be streamed.
"""

import difflib
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict
from PIL import Image, UnidentifiedImageError

from bigbatch.data import local_copy
from bigbatch.data.augment import check_window
from bigbatch.dotted import is_dotted, resolve
from bigbatch.mistake import Mistake
from bigbatch.storage import bucket

# Pillow's modes, by the number of channels that a TFDS image may have.
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
READ_AT_ONCE = 1000  # records

Records = Sequence[Mapping[str, Any]]  # see `tfds_records`


class Dataset(NamedTuple):
    """A data set in memory, as NumPy arrays."""

    train_images: np.ndarray  # uint8 (N, H, W, C)
    train_labels: np.ndarray  # int32 (N,), from 0
    test_images: np.ndarray  # uint8 (M, H, W, C)
    test_labels: np.ndarray  # int32 (M,)


def load(data: ConfigDict) -> Dataset:
    """Loads the whole data set that `data` (config.data) names.

    Raises:
        Mistake: if the name or the data is wrong; the message says how and what to change.
    """
    if data.name == "digits":
        return _digits(data)
    if is_dotted(data.name):
        return _from_function(data)
    builder = open_tfds(data)
    channels = builder.info.features["image"].shape[-1]
    splits = (data.train_split, data.test_split)
    # Open both splits before decoding either, so that a wrong name is reported at once.
    sources = [tfds_records(builder, data.name, split) for split in splits]
    train, test = (
        _decode_all(source, f"split {split!r} of {data.name}", channels)
        for source, split in zip(sources, splits, strict=True)
    )
    return _checked(Dataset(*train, *test), data.name, data.num_classes)


def open_records(data: ConfigDict) -> tuple[Records, Records]:
    """Opens both splits that `data` (config.data) names, to be streamed: (train, test) records.

    Checks that they agree with the config, as far as is possible without decoding images.

    Raises:
        Mistake: if they do not, or cannot be read; the message has the key to change.
    """
    if data.name == "digits" or is_dotted(data.name):
        raise Mistake(
            "config.data.streaming is True, but only a TFDS data set can be streamed and "
            f"{data.name} is none: set --config.data.streaming=False."
        )
    builder = open_tfds(data)
    channels = builder.info.features["image"].shape[-1]
    if channels != 3:
        raise Mistake(
            "config.data.streaming is True, but only images of 3 channels can be streamed and "
            f"{data.name} has {channels}: set --config.data.streaming=False."
        )
    train, test = (
        tfds_records(builder, data.name, split) for split in (data.train_split, data.test_split)
    )
    _check_sizes(data, len(train), len(test), (data.image_size, data.image_size, channels))
    for split, records in ((data.train_split, train), (data.test_split, test)):
        _read(records, [0], f"split {split!r} of {data.name}")
    return train, test


def check(dataset: Dataset, data: ConfigDict) -> None:
    """Checks that a data set agrees with `data` (config.data).

    Raises:
        Mistake: if it does not, with the key to change and the value to set.
    """
    train, test = dataset.train_images, dataset.test_images
    _check_sizes(data, len(train), len(test), train.shape[1:])


def _check_sizes(
    data: ConfigDict, train: int, test: int, image_shape: tuple[int, int, int]
) -> None:
    """Checks numbers of examples and an image shape (height, width, channels) against `data`."""
    for key, split, found in (
        ("train_examples", data.train_split, train), ("test_examples", data.test_split, test),
    ):
        if data[key] != found:
            raise Mistake(
                f"config.data.{key} is {data[key]} but split {split!r} of {data.name} has "
                f"{found} examples: set --config.data.{key}={found}."
            )
    height, width, channels = image_shape
    for key in ("mean", "std"):
        if len(data[key]) != channels:
            raise Mistake(
                f"config.data.{key} is {tuple(data[key])}, but the images of {data.name} "
                f"have {channels} channel{'s'[: channels != 1]}: set one value per channel."
            )
    crop = data.augment.crop
    check_window(height, width, data.augment.pad, crop)
    if not crop and height != width:
        raise Mistake(
            f"the images of {data.name} are {height}x{width} and the network gets squares: "
            f"set --config.data.augment.crop={min(height, width)} or less."
        )
    side = crop or height
    if data.image_size != side:
        cut = f"cropped to {crop}x{crop}" if crop else f"{height}x{width}, uncropped"
        raise Mistake(
            f"config.data.image_size is {data.image_size}, but the images of {data.name} are "
            f"{cut}: set --config.data.image_size={side}, or change --config.data.augment.crop."
        )


def open_tfds(data: ConfigDict) -> Any:
    """Opens the TFDS data set `data.name`, prepared as ArrayRecord files in `data.dir`.

    An absent data set is not prepared, as `tfds.data_source` would do. The data set's own code is
    not needed, since the folder's metadata describes the data set completely. Files in a bucket
    (gs://) are first copied, once; see `local_copy`.

    Returns:
        A read-only TFDS builder.

    Raises:
        Mistake: if the data set is unknown, not prepared, or prepared in another file format, with
            the command that prepares it; if it is not a data set of labelled images; or if its
            number of classes is not `data.num_classes`.
    """
    from etils import epath
    from tensorflow_datasets.core import constants
    from tensorflow_datasets.core.read_only_builder import builder_from_files

    remote = bucket.in_bucket(data.dir)
    if "://" in data.dir and not remote:
        raise Mistake(
            f"config.data.dir is {data.dir!r}; it must be a folder of each host, or in a bucket: "
            "gs://BUCKET/PATH."
        )
    if remote:
        bucket.check(data.dir)
    folder = epath.Path(data.dir or constants.DATA_DIR).expanduser()
    try:
        builder = builder_from_files(data.name, data_dir=folder)
    except ValueError:  # TFDS's DatasetNotFoundError, or a name it cannot parse
        raise Mistake(_not_prepared(data.name, folder)) from None
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


def tfds_records(builder: Any, name: str, split: str) -> Records:
    """Opens a split: its records by number, each with `image` (encoded bytes) and `label` (int).

    Args:
        builder: from `open_tfds`.
        name: of the data set, for messages.
        split: a TFDS split, such as 'train' or 'train[:90%]'.

    Raises:
        Mistake: if there is no such split, or if it is empty.
    """
    import tensorflow_datasets as tfds

    try:
        examples = builder.info.splits[split].num_examples
    except (ValueError, KeyError):
        raise Mistake(
            f"{name} has no split {split!r}; it has {', '.join(builder.info.splits)}, or a part "
            "of one, as 'train[:90%]'."
        ) from None
    if not examples:
        raise Mistake(f"split {split!r} of {name} is empty.")
    return builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})


def decode(encoded: bytes, channels: int) -> np.ndarray:
    """Decodes a JPEG or PNG image: uint8 (height, width, channels).

    Pillow decodes, not whichever decoder TFDS finds installed: decoders differ in the last bits.

    Raises:
        Mistake: if the bytes are not a whole image, or its pixels do not say which of them is
            white.
    """
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            image = _of_8_bits(image, len(encoded))
            image = image if image.mode == MODES[channels] else image.convert(MODES[channels])
            pixels = np.asarray(image)
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        # Pillow's message would show the address of the buffer.
        reason = "" if isinstance(error, UnidentifiedImageError) else f": {error}"
        raise Mistake(f"{len(encoded)} bytes that are no whole image{reason}") from None
    return pixels.reshape(*pixels.shape[:2], channels)


def _of_8_bits(image: Image.Image, size: int) -> Image.Image:
    """An image of 16 bits by its upper 8, as OpenCV and libpng have it; any other as it is.

    Pillow's own `convert` keeps the values of a grey image and cuts them off at 255, and all but
    the darkest pixels would be white. (16-bit colours it reads by their upper 8 bits itself.)
    """
    # Pillow before version 11 opens a grey PNG of 16 bits as I, which is 32 bits elsewhere.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise Mistake(
            f"{size} bytes of a {image.format} image of 32 bits a pixel, which does not say which "
            "value is white: save it with 8 bits"
        )
    return image


def _read(records: Records, numbers: Sequence[int], what: str) -> list[Mapping[str, Any]]:
    """Reads the records with these numbers, still encoded."""
    try:
        return records.__getitems__(list(numbers))
    except RuntimeError as error:  # from ArrayRecord, for absent or broken files
        raise Mistake(f"{what} cannot be read: {error}") from error


def _decode_all(source: Records, what: str, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Decodes a split: images and labels. CIFAR-10 takes about 7 seconds, also with threads."""
    images, labels = np.empty((0,), np.uint8), np.empty(len(source), np.int64)
    for start in range(0, len(source), READ_AT_ONCE):
        stop = min(start + READ_AT_ONCE, len(source))
        for record, example in enumerate(_read(source, range(start, stop), what), start):
            try:
                pixels = decode(example["image"], channels)
            except Mistake as error:
                raise Mistake(f"record {record} of {what} is {error}.") from None
            if record == 0:
                images = np.empty((len(source), *pixels.shape), np.uint8)
            if pixels.shape != images.shape[1:]:
                first, other = ("x".join(map(str, p.shape[:2])) for p in (images[0], pixels))
                raise Mistake(
                    f"{what} has images of more than one shape (record 0 is {first}, record "
                    f"{record} {other}), which cannot live in device memory as one array: set "
                    "--config.data.streaming=True."
                )
            images[record] = pixels
            labels[record] = example["label"]
    return images, labels


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
            f"Image of type uint8) and 'label' (one whole number), but it has {has}."
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
        close = difflib.get_close_matches(base, ["digits", *known], n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        return (
            f"config.data.name is {name!r}; it must be 'digits', the name of a TFDS data set, or "
            f"the dotted path of a function. TFDS has no data set of this name, and {folder} has "
            f"none either ({there}).{hint}"
        )
    return (
        f"{name} is not in {folder} ({there}). If it is elsewhere, set --config.data.dir to the "
        f"folder that holds {base}/. Otherwise prepare it once, in a separate Python environment:\n"
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


def _digits(data: ConfigDict) -> Dataset:
    """Loads scikit-learn's 1 797 digits of 8x8 pixels; every fifth is in the test set."""
    from sklearn.datasets import load_digits

    if (data.train_split, data.test_split) != ("train", "test"):
        raise Mistake(
            f"config.data.train_split is {data.train_split!r} and test_split {data.test_split!r}; "
            "the digits have the splits 'train' and 'test' only."
        )
    digits = load_digits()
    images = (digits.images * 15).astype(np.uint8)[..., None]  # 0 to 16 becomes 0 to 240, exactly
    test = np.arange(len(images)) % 5 == 0
    return _checked(
        Dataset(images[~test], digits.target[~test], images[test], digits.target[test]),
        "the digits", data.num_classes,
    )


def _from_function(data: ConfigDict) -> Dataset:
    """Calls the user's function, which returns a Dataset, four arrays, or a dict of them."""
    function = resolve(data.name, "config.data.name")
    arrays = function(data)
    fields = Dataset._fields
    if isinstance(arrays, Mapping) and set(arrays) == set(fields):
        arrays = tuple(arrays[field] for field in fields)
    if not isinstance(arrays, tuple | list) or len(arrays) != len(fields):
        kind = type(arrays).__name__
        got = (f"a {kind} of {', '.join(map(str, arrays)) or 'nothing'}"
               if isinstance(arrays, Mapping) else
               f"a {kind} of {len(arrays)}" if isinstance(arrays, tuple | list) else f"a {kind}")
        raise Mistake(
            f"{data.name} returned {got}; it must return four arrays, {', '.join(fields)}: in this "
            "order, or as a dict with these keys."
        )
    return _checked(Dataset(*map(np.asarray, arrays)), data.name, data.num_classes)


def _checked(dataset: Dataset, who: str, classes: int) -> Dataset:
    """The data set with int32 labels; raises Mistake for the first fault that it has."""
    for split, images, labels in (
        ("train", dataset.train_images, dataset.train_labels),
        ("test", dataset.test_images, dataset.test_labels),
    ):
        if images.dtype != np.uint8:
            raise Mistake(
                f"{who}: {split}_images are {images.dtype}; they must be uint8, 0 to 255 "
                "(config.data.mean and std normalise them)."
            )
        if images.ndim != 4 or not images.size:
            raise Mistake(
                f"{who}: {split}_images have the shape {images.shape}; it must be (images, height, "
                "width, channels), and none of them 0."
            )
        if not np.issubdtype(labels.dtype, np.integer) or labels.shape != images.shape[:1]:
            raise Mistake(
                f"{who}: {split}_labels are {labels.dtype} of shape {labels.shape}; they must be "
                f"whole numbers, one an image: {images.shape[:1]}."
            )
        if labels.min() < 0 or labels.max() >= classes:
            raise Mistake(
                f"{who}: {split}_labels run from {labels.min()} to {labels.max()}; they must lie "
                f"in [0, {classes}), as config.data.num_classes is {classes}."
            )
    if dataset.train_images.shape[1:] != dataset.test_images.shape[1:]:
        raise Mistake(
            f"{who}: train_images are {dataset.train_images.shape[1:]} and test_images "
            f"{dataset.test_images.shape[1:]} (height, width, channels); they must be alike."
        )
    return Dataset(*(
        np.ascontiguousarray(array, array.dtype if array.ndim == 4 else np.int32)
        for array in dataset
    ))
