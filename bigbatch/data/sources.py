"""Opens data sets: the digits, TFDS's, folders of images, CIFAR's archives, a function's arrays.

TFDS data sets are read without TensorFlow, from ArrayRecord files that were prepared beforehand.
`load` decodes a whole data set, for device memory; `open_records` opens one to be streamed.
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict
from PIL import Image, UnidentifiedImageError

from bigbatch.data import cifar, folder, splits
from bigbatch.data.augment import check_window
from bigbatch.data.prepared import MODES, Records, data_folder, open_tfds, tfds_records
from bigbatch.dotted import is_dotted, resolve
from bigbatch.mistake import Mistake

READ_AT_ONCE = 1000  # records


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
    archive = _cifar(data)
    if archive:
        return _from_archive(data, *archive)
    if data.name == folder.NAME:
        return _from_folder(data)
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
    archive = _cifar(data)
    if data.name == "digits" or is_dotted(data.name) or archive:
        where = f" in {archive[1]}" if archive else ""
        raise Mistake(
            "config.data.streaming is True, but only a TFDS data set or a folder can be streamed "
            f"and {data.name}{where} is none: set --config.data.streaming=False."
        )
    channels = 3
    if data.name == folder.NAME:
        train, test = folder.open_files(data)
    else:
        builder = open_tfds(data)
        channels = builder.info.features["image"].shape[-1]
        if channels != 3:
            raise Mistake(
                "config.data.streaming is True, but only images of 3 channels can be streamed and "
                f"{data.name} has {channels}: set --config.data.streaming=False."
            )
        train, test = (
            tfds_records(builder, data.name, split)
            for split in (data.train_split, data.test_split)
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
    except Mistake:
        raise
    except Exception as error:  # of many kinds: Pillow passes on what its decoders meet
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
                file = f" ({example['file_name']})" if "file_name" in example else ""
                raise Mistake(f"record {record}{file} of {what} is {error}.") from None
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


def _cifar(data: ConfigDict) -> tuple[cifar.Archive, Path] | None:
    """The original archive of CIFAR that is in `data.dir`, and where, if no TFDS set is there."""
    if data.name not in cifar.ARCHIVES or "://" in data.dir:
        return None
    place = Path(data_folder(data))
    return None if (place / data.name).is_dir() else cifar.find(data.name, place)


def _from_archive(data: ConfigDict, archive: cifar.Archive, path: Path) -> Dataset:
    classes = cifar.CLASSES[data.name]
    if data.num_classes != classes:
        raise Mistake(
            f"config.data.num_classes is {data.num_classes} but {data.name} has {classes} classes: "
            f"set --config.data.num_classes={classes}."
        )
    parts = dict(zip(("train", "test"), cifar.load(archive, path), strict=True))
    arrays = []
    for split in (data.train_split, data.test_split):
        name = splits.name_of(split)
        if name not in parts:
            raise Mistake(
                f"{data.name} has no split {split!r}; it has train, test, or a part of one, as "
                "'train[:90%]'."
            )
        numbers = splits.stretch(split, len(parts[name][0]))
        arrays += [array[numbers.start : numbers.stop] for array in parts[name]]
    return _checked(Dataset(*arrays), f"{data.name} in {path}", data.num_classes)


def _from_folder(data: ConfigDict) -> Dataset:
    channels = len(data.mean)
    if channels not in MODES:
        raise Mistake(
            f"config.data.mean is {tuple(data.mean)}; it must have one value per channel of the "
            "images, and these are read with as many channels: 1, 3 or 4."
        )
    arrays = []
    for records, split in zip(
        folder.open_files(data), (data.train_split, data.test_split), strict=True
    ):
        arrays += _decode_all(records, f"split {split!r} of {data.dir}", channels)
    return _checked(Dataset(*arrays), data.dir, data.num_classes)


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
    return _checked(Dataset(*(
        _as_array(array, f"{data.name}: {field}")
        for field, array in zip(fields, arrays, strict=True)
    )), data.name, data.num_classes)


def _as_array(given: Any, what: str) -> np.ndarray:
    try:
        array = np.asarray(given)
    except ValueError:  # NumPy's, of a list of arrays of several shapes
        array = np.empty(0, object)
    if array.dtype == object:
        raise Mistake(
            f"{what} cannot be made one array of numbers. Images must be of one size, and labels "
            "one whole number an image; images of several sizes can be streamed from files "
            "(config.data.streaming)."
        )
    return array


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
                f"whole numbers, one an image: {images.shape[:1]}. Regression and several labels "
                "an image are tasks of your own: config.task (docs/tasks.md)."
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
