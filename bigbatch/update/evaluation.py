"""The loss and accuracy of a network over the whole test set."""

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
from bigbatch.data.feed import Feed
from bigbatch.job.devices import AXIS, compiler_options
from bigbatch.update import network


def make_evaluate(config: ConfigDict, net: network.Network, mesh: Mesh) -> Callable:
    """Makes the jitted function `(params, batch_stats, test, batch) -> float[3]`.

    The result is the sum of the cross entropy, the number of correct predictions, and the number of
    examples, over one batch of all devices.

    `test` has the test set's `images` and `labels`, replicated; it is {} if the test set is
    streamed. `batch` has `record` (int32, -1 for padding) and, if the test set is streamed,
    `images` and `labels`.
    """
    dtype = jnp.promote_types(config.dtype, jnp.float32)  # of the logits

    def evaluate(params: Any, batch_stats: Any, test: Mapping, batch: Mapping) -> jax.Array:
        record = batch["record"]
        if "images" in batch:
            images, labels = batch["images"], batch["labels"]
        else:
            rows = jnp.maximum(record, 0)
            images, labels = test["images"].take(rows), test["labels"][rows]
        logits = logits_of(config, net, params, batch_stats, images)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        real = record >= 0
        sums = jnp.stack([
            jnp.sum(jnp.where(real, losses, 0.0)),
            jnp.sum(real & (jnp.argmax(logits, axis=1) == labels)).astype(dtype),
            jnp.sum(real).astype(dtype),
        ])
        return jax.lax.psum(sums, AXIS)

    mapped = jax.shard_map(
        evaluate, mesh=mesh, in_specs=(P(), P(), P(), P(AXIS)), out_specs=P(), check_vma=False
    )
    return jax.jit(mapped, compiler_options=compiler_options(mesh))


def logits_of(
    config: ConfigDict, net: network.Network, params: Any, batch_stats: Any,
    images_BxHxWxC: jax.Array,
) -> jax.Array:
    """The logits of images as they are in the data set, cropped and normalised for evaluation.

    Args:
        config: of the run.
        net: its network.
        params: its parameters.
        batch_stats: its running statistics.
        images_BxHxWxC: uint8.

    Returns:
        (B, classes) in float32, or in float64 where `config.dtype` is.
    """
    images = augment.crop_centre(images_BxHxWxC, config.data.augment.crop)
    images = augment.normalise(images, config.data.mean, config.data.std, jnp.dtype(config.dtype))
    keys = jax.random.split(jax.random.key(0), images.shape[0])  # not used in evaluation
    logits, *_ = net.apply(params, batch_stats, images, False, keys)
    return logits.astype(jnp.promote_types(config.dtype, jnp.float32))


def networks_of(state: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The parameters and running statistics to evaluate, by the end of the names of their results.

    Args:
        state: the fields of an `update.State`, or what `checkpoint.load` returns.

    Returns:
        "" for the weights, and "_average" for their average, if the run keeps one.
    """
    found = {"": (state["params"], state["batch_stats"])}
    if average := state.get("average"):
        found["_average"] = average["params"], average["batch_stats"]
    return found


def whole_test_set(
    program: Callable, networks: Mapping[str, tuple[Any, Any]], fed: Feed,
    before_batch: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Evaluates every test example once: `test_loss` (mean cross entropy) and `test_accuracy`.

    Args:
        program: the function that `make_evaluate` returns, jitted or compiled.
        networks: see `networks_of`; all of them see a batch before the next one is asked for.
        fed: the feed that yields the test set.
        before_batch: called before each batch; its exceptions are not caught.

    Returns:
        Both numbers for each network, whose key their names end with.

    Raises:
        Mistake: if a record cannot be read or decoded, or if all images were skipped.
    """
    sums: dict[str, list[jax.Array]] = {end: [] for end in networks}
    last: list[jax.Array] = []
    for batch in fed.evaluation():
        before_batch()
        before, last = last, [program(*one, fed.test, batch) for one in networks.values()]
        for end, part in zip(networks, last, strict=True):
            sums[end].append(part)
        # At most two batches are on the devices, so that a stop is noticed soon.
        jax.block_until_ready(before)
    results = {}
    for end, parts in sums.items():
        loss, correct, examples = np.sum([np.asarray(part, np.float64) for part in parts], axis=0)
        if not examples:  # the same in all processes
            raise fed.none_of_use("the test set")
        results |= {f"test_loss{end}": float(loss / examples),
                    f"test_accuracy{end}": float(correct / examples)}
    return results
