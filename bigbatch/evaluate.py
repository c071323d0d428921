"""Loss and accuracy over the whole test set; as a program, those of a run's last checkpoint.

    python -m bigbatch.evaluate --workdir=DIR
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from bigbatch.data import augment
from bigbatch.devices import AXIS
from bigbatch.network import Network


def make_evaluate(config: ConfigDict, network: Network, mesh: Mesh) -> Callable:
    """The jitted function `(params, batch_stats, test, batch) -> float[3]`.

    The result is the sums of (cross entropy, correct, examples) over one batch of all devices.
    `test` has the test set's `images` and `labels` replicated, or is {} when they are fed; `batch`
    has `record` (int32, -1 where a seat is empty), and `images` and `labels` where they are fed.
    """
    dtype = jnp.promote_types(config.dtype, jnp.float32)

    def evaluate(params: Any, batch_stats: Any, test: Mapping, batch: Mapping) -> jax.Array:
        record = batch["record"]
        if "images" in batch:
            source, labels, rows = batch["images"], batch["labels"], jnp.arange(len(record))
        else:
            rows = jnp.maximum(record, 0)
            source, labels = test["images"], test["labels"][rows]
        images = augment.take_plain(source, rows, config.data.augment.crop)
        images = augment.normalise(
            images, config.data.mean, config.data.std, jnp.dtype(config.dtype)
        )
        keys = jax.random.split(jax.random.key(0), len(record))  # drawn from by no one
        logits, *_ = network.apply(params, batch_stats, images, False, keys)
        logits = logits.astype(dtype)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        seated = record >= 0
        sums = jnp.stack([
            jnp.sum(jnp.where(seated, losses, 0.0)),
            jnp.sum(seated & (jnp.argmax(logits, axis=1) == labels)).astype(dtype),
            jnp.sum(seated).astype(dtype),
        ])
        return jax.lax.psum(sums, AXIS)

    return jax.jit(jax.shard_map(
        evaluate, mesh=mesh, in_specs=(P(), P(), P(), P(AXIS)), out_specs=P(), check_vma=False
    ))


def mean_of(sums: list[jax.Array]) -> tuple[float, float]:
    """Mean cross entropy and accuracy from the sums of all batches."""
    loss, correct, examples = np.sum([np.asarray(part, np.float64) for part in sums], axis=0)
    return float(loss / examples), float(correct / examples)
