"""Photographs that are decoded, cropped and resized to squares while a run trains."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from bigbatch.data import decode
from bigbatch.mistake import Mistake

CROPS = {"goyal": decode.random_resized_crop_box, "inception": decode.inception_crop_box}


@dataclasses.dataclass(frozen=True)
class Photographs:
    """Reads the examples of a split, see `examples.Reader`: a square image, and its label."""

    records: Sequence[Mapping[str, Any]]  # `image` (encoded) and `label`, as `sources.tfds_records`
    split: str  # for messages
    train: bool  # False: the test set, which is not cropped at random
    seed: int
    classes: int
    size: int
    style: str
    eval_share: float
    resample: str
    skip: bool

    def __len__(self) -> int:
        return len(self.records)

    def read(
        self, record: int, epoch: int, position: int
    ) -> tuple[Mapping[str, np.ndarray], str]:
        """Reads an example: `images`, uint8 (size, size, 3), and its `labels`; see `Reader.read`.

        Raises:
            Mistake: if the record cannot be read, or if its image or label is faulty and it is not
                to be skipped; the message names the record.
        """
        try:
            example = self.records[record]
        except RuntimeError as error:  # from ArrayRecord, for absent or broken files
            raise Mistake(
                f"record {record} of split {self.split!r} cannot be read: {error}"
            ) from error
        encoded, label = example["image"], int(example["label"])
        try:
            if not 0 <= label < self.classes:
                raise Mistake(f"the label is {label}, outside [0, {self.classes})")
            box = self._box(*decode.dimensions(encoded), epoch, position)
            pixels = decode.decode(encoded, box, self.size, self.resample)
            return {"images": pixels, "labels": np.int32(label)}, ""
        except Mistake as error:
            reason = f"record {record}{_name(example)} of split {self.split!r}: {error}"
            if self.skip:
                return {}, reason
            raise Mistake(
                f"{reason}. Repair it, or set --config.data.on_bad_image=skip to go on without it."
            ) from None

    def _box(
        self, width: int, height: int, epoch: int, epoch_position: int
    ) -> tuple[int, int, int, int]:
        if not self.train or self.style == "none":
            return decode.eval_box(width, height, self.eval_share, self.style)
        draws = decode.uniforms(self.seed, epoch, epoch_position)
        return CROPS[self.style](width, height, draws)


def make_reader(
    records: Sequence[Mapping[str, Any]], data: ConfigDict, train: bool, seed: int
) -> Photographs:
    """Makes the reader of one split of a data set.

    Args:
        records: of the split, from `sources.open_records`.
        data: config.data. Its `crop_style` is "goyal", "inception" or "none"; see `decode`.
        train: whether the split is the training set, with random crops, or the test set.
        seed: of the run.
    """
    return Photographs(
        records=records, split=data.train_split if train else data.test_split, train=train,
        seed=seed, classes=data.num_classes, size=data.image_size, style=data.crop_style,
        eval_share=data.eval_share, resample=data.resample, skip=data.on_bad_image == "skip",
    )


def _name(example: Mapping[str, Any]) -> str:
    """The name that the data set gives an example, in brackets; "" if it gives none."""
    for key in ("file_name", "id", "tfds_id"):
        if key in example:
            name = example[key]
            return f" ({name.decode(errors='replace') if isinstance(name, bytes) else name})"
    return ""
