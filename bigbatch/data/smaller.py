"""Known data sets made smaller, for curves on a laptop: what `configs/small.py` names as its data.

Here and not in that file, because a saved run names its data by dotted path, and goes on in any
folder.
"""

import numpy as np
from ml_collections import ConfigDict

from bigbatch.data import sources


def half_resolution(data: ConfigDict) -> sources.Dataset:
    """CIFAR-10 with each 2x2 pixels averaged."""
    cifar10 = ConfigDict(data)
    cifar10.update({"name": "cifar10"})
    dataset = sources.load(cifar10)
    return dataset._replace(
        train_images=_halved(dataset.train_images), test_images=_halved(dataset.test_images)
    )


def some_digits(data: ConfigDict) -> sources.Dataset:
    """The digits, of which the last 157 training images are left out."""
    every = ConfigDict(data)
    every.update({"name": "digits"})
    dataset = sources.load(every)
    kept = data.train_examples
    return dataset._replace(
        train_images=dataset.train_images[:kept], train_labels=dataset.train_labels[:kept]
    )


def _halved(images_NxHxWxC: np.ndarray) -> np.ndarray:
    count, height, width, channels = images_NxHxWxC.shape
    blocks = images_NxHxWxC.reshape(count, height // 2, 2, width // 2, 2, channels)
    return np.round(blocks.mean(axis=(2, 4))).astype(np.uint8)
