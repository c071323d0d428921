"""Images, each of one class: cross entropy, and accuracy.

The data are those that `config.data.name` names, see `data/sources.py`. The network returns logits
(B, classes), or (logits, [(weight, auxiliary logits), ...]).
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from bigbatch.data import augment, photographs, sources
from bigbatch.mistake import Mistake
from bigbatch.tasks import Field, InMemory, Streamed


def fields(config: ConfigDict) -> dict[str, Field]:
    """`images`, uint8 (height, width, channels), and `labels`, int32 ().

    Raises:
        Mistake: if there is only one class.
    """
    data, options = config.data, config.data.augment
    if data.num_classes < 2:
        raise Mistake(f"config.data.num_classes is {data.num_classes}; it must be 2 or more.")
    # Resident images are cropped by `prepare`, and streamed ones when they are read.
    side = data.image_size if data.streaming else max(
        options.crop or data.image_size, options.pad + 1 if options.pad > 0 else 1)
    return {
        "images": Field((side, side, len(data.mean)), np.uint8, or_larger=not data.streaming),
        "labels": Field((), np.int32),
    }


def prepare(
    config: ConfigDict, fields_B: Mapping[str, jax.Array], keys_B: jax.Array, train: bool
) -> tuple[jax.Array, jax.Array]:
    """The images, augmented (or cropped at their centre) and normalised, and the labels."""
    images, options = fields_B["images"], config.data.augment
    if train:
        images = augment.crop_and_flip(images, keys_B, options.pad, options.crop, options.flip)
    else:
        images = augment.crop_centre(images, options.crop)
    images = augment.normalise(images, config.data.mean, config.data.std, jnp.dtype(config.dtype))
    return images, fields_B["labels"]


def losses(
    config: ConfigDict, outputs_B: Any, labels_B: jax.Array
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """The cross entropy, whether the class is right, and what is minimised.

    That is the cross entropy against smoothed labels, and that of auxiliary logits by their
    weights.

    Raises:
        Mistake: if the network returns something else than logits.
    """
    logits, auxiliary = logits_of(config, outputs_B, len(labels_B))
    dtype = jnp.promote_types(config.dtype, jnp.float32)
    targets = optax.smooth_labels(
        jax.nn.one_hot(labels_B, config.data.num_classes, dtype=dtype), config.label_smoothing)
    logits, one_each = logits.astype(dtype), jnp.ones(len(labels_B), dtype)
    objective = optax.softmax_cross_entropy(logits, targets)
    for weight, more in auxiliary:
        objective += weight * optax.softmax_cross_entropy(more.astype(dtype), targets)
    plain = optax.softmax_cross_entropy_with_integer_labels(logits, labels_B)
    correct = (jnp.argmax(logits, axis=1) == labels_B).astype(dtype)
    return {"loss": (plain, one_each), "accuracy": (correct, one_each),
            "objective": (objective, one_each)}


def logits_of(
    config: ConfigDict, outputs_B: Any, examples: int
) -> tuple[jax.Array, list[tuple[float, jax.Array]]]:
    """The logits and the list of (weight, auxiliary logits); raises Mistake for other outputs."""
    name, shape = config.network, (examples, config.data.num_classes)
    logits, auxiliary = outputs_B if _is_pair(outputs_B) else (outputs_B, [])
    if not isinstance(auxiliary, list | tuple) or not all(map(_is_pair, auxiliary)):
        raise Mistake(
            f"{name} returns {type(auxiliary).__name__} beside its logits; it must be a list of "
            "(weight, auxiliary logits) pairs."
        )
    for given in (logits, *(more for _, more in auxiliary)):
        if getattr(given, "shape", None) != shape:
            found = getattr(given, "shape", type(given).__name__)
            raise Mistake(
                f"{name} returns logits of shape {found} for {shape[0]} images; they must be "
                f"{shape}: (images, config.data.num_classes)."
            )
    return logits, list(auxiliary)


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2


def load(config: ConfigDict) -> InMemory | Streamed:
    """The data set that `config.data` names.

    Raises:
        Mistake: if the name or the data is wrong; the message says how and what to change.
    """
    data = config.data
    if data.streaming:
        records = sources.open_records(data)
        return Streamed(*(photographs.make_reader(split, data, train, config.seed)
                          for split, train in zip(records, (True, False), strict=True)))
    dataset = sources.load(data)
    sources.check(dataset, data)
    return InMemory({"images": dataset.train_images, "labels": dataset.train_labels},
                    {"images": dataset.test_images, "labels": dataset.test_labels})
