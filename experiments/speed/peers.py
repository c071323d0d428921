"""An update beside that of others: Flax's ImageNet example, Flax's BatchNorm, PyTorch."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from bigbatch.job import chips
from bigbatch.job.devices import compiler_options, make_mesh
from bigbatch.models import wide_resnet as wide_resnet_module
from bigbatch.models.normalization import GhostBatchNorm
from bigbatch.programs import compilation
from bigbatch.update import network
from experiments.figures import load_config
from experiments.machine import own_cores
from experiments.speed import flax_resnet
from experiments.speed.bare import NOISE, BareUpdate, describe, on_gpu, wide_resnet
from experiments.speed.measure import Measurement, beside, check_same_loss


def flax_example(repeats: int, short: bool) -> list[Measurement]:
    """ResNet-50's update beside that of Flax's ImageNet example, images on the device."""
    batch, size = (128, 224) if on_gpu() else (4, 32) if short else (32, 64)
    width, classes = (4, 10) if short else (64, 1000)
    dtype = "bfloat16" if on_gpu() else "float32"
    config = load_config(
        f"configs/imagenet_resnet50.py:batch_8k,{NOISE},dtype={dtype},ghost_size={batch},"
        f"recipe.batch_size={batch},max_per_device_batch={batch},data.train_examples={batch},"
        f"data.test_examples=1,data.image_size={size},data.num_classes={classes},"
        f"model.width={width}")
    ours = BareUpdate(config, augmented=False)
    theirs = flax_resnet.ResNet(classes, jnp.dtype(dtype), width=width)
    init, step = flax_resnet.make_step(theirs, 0.01, config.recipe.momentum, 1e-4)
    # Copies, because our update donates its own arrays.
    copied = jax.tree.map(jnp.array, (ours.state.params, ours.state.batch_stats))
    state = init(*map(flax_resnet.from_ours, copied))
    images, labels = ours.batches[0]["images"], ours.batches[0]["labels"]
    expected = jax.eval_shape(theirs.init, jax.random.key(0), images)["params"]
    if jax.tree.map(jnp.shape, state.params) != jax.tree.map(jnp.shape, expected):
        raise RuntimeError("Flax's ResNet has other parameters than ours.")
    # With the compiler options of our own programs, so that the code is compared and not XLA's.
    call = step.lower(state, images, labels).compile(compiler_options(make_mesh()))

    def take_theirs() -> float:
        nonlocal state
        state, (loss, _) = call(state, images, labels)
        jax.block_until_ready(state)
        return float(loss)

    ours.take()
    check_same_loss(ours.loss, take_theirs(), _tolerance())
    return [beside(
        "update beside Flax's ImageNet example",
        f"ResNet-50, batch {batch} of {size}x{size}, {dtype}, one device; equal parameters and "
        "first loss", ">= 1.0", {"flax": take_theirs, "bigbatch": ours.take}, repeats)]


class FlaxNorm(GhostBatchNorm):
    """Flax's BatchNorm, over the whole batch, on the variables of a GhostBatchNorm."""

    def __call__(self, inputs: jax.Array, train: bool) -> jax.Array:
        features = inputs.shape[-1]
        flaxs = nnx.BatchNorm(
            features, use_running_average=not train, momentum=0.9, epsilon=self.epsilon,
            dtype=self.dtype, rngs=nnx.Rngs(0))
        flaxs.scale, flaxs.bias, flaxs.mean, flaxs.var = self.scale, self.bias, self.mean, self.var
        outputs = flaxs(inputs)
        if train:  # the update folds one row of each ghost batch; here all rows are equal
            for running in (self.mean, self.var):
                running.set_value(jnp.broadcast_to(
                    running[...], (len(inputs) // self.ghost_size, features)))
        return outputs


def with_flax_norm(config: ConfigDict) -> network.Network:
    """The Wide ResNet with Flax's BatchNorm in place of every GhostBatchNorm."""
    with mock.patch.object(wide_resnet_module, "GhostBatchNorm", FlaxNorm):
        return network.build(config, may_mix=True)


def wide_resnet_of(batch: int, ghost: int, short: bool, *settings: str) -> ConfigDict:
    """`wide_resnet` for an update of `batch` examples in one pass."""
    return wide_resnet(
        short, f"ghost_size={ghost}", f"recipe.batch_size={batch}", f"max_per_device_batch={batch}",
        f"data.train_examples={max(batch, 512)}", "data.test_examples=1", *settings)


def flax_norm(repeats: int, short: bool) -> list[Measurement]:
    """WRN-16-4's update with ghost batch normalisation beside the one with Flax's BatchNorm."""
    batch = 1024 if on_gpu() else 16 if short else 64
    found = []
    for ghosts in (1, 4):
        config = wide_resnet_of(batch, batch // ghosts, short)
        ours = BareUpdate(config)
        theirs = BareUpdate(config, with_flax_norm(config))
        # The two trees differ in the order of their leaves alone, so parameters can be copied.
        theirs.state = theirs.state._replace(
            params=jax.tree.map(jnp.array, ours.state.params))
        ours.take()
        theirs.take()
        if ghosts == 1:
            check_same_loss(ours.loss, theirs.loss, _tolerance())
        found.append(beside(
            "ghost batch norm beside Flax's BatchNorm",
            f"{describe(config)} update, batch {batch}, {ghosts} ghost batch{'es' * (ghosts > 1)}",
            ">= 0.97", {"flax": theirs.take, "ghost": ours.take}, repeats))
    return found


def pytorch(repeats: int, short: bool) -> list[Measurement]:
    """WRN-16-4's update beside the same network in PyTorch, images on the device."""
    batches = (128, 5120) if on_gpu() else (16,) if short else (64,)
    dtype, name = "bfloat16" if on_gpu() else "float32", "update beside PyTorch"
    try:
        from experiments.speed import torch_wide_resnet
    except ImportError:
        return [Measurement(name, "WRN-16-4", ">= 1.0", "x", [],
                            "skipped: torch is not installed in this environment")]
    threads, found = len(own_cores()), []
    for batch in batches:
        config = wide_resnet_of(batch, batch, short)
        ours = BareUpdate(config, augmented=False)
        theirs = torch_wide_resnet.Update(
            config.model.depth, config.model.width, config.data.num_classes,
            np.asarray(ours.batches[0]["images"], np.float32),
            np.asarray(ours.batches[0]["labels"]), 0.01, config.recipe.momentum,
            config.optimizer.weight_decay, threads)
        own = sum(leaf.size for leaf in jax.tree.leaves(ours.state.params))
        if own != theirs.parameters:
            raise RuntimeError(f"{own} parameters beside {theirs.parameters} in PyTorch.")
        torch = torch_wide_resnet.torch
        how = "autocast, compiled" if on_gpu() else f"{threads} threads"
        setting = f"{describe(config)}, batch {batch}, {dtype}"
        found.append(beside(
            name, f"{setting}; torch {torch.__version__}, channels last, {how}", ">= 1.0",
            {"torch": theirs.take, "bigbatch": ours.take}, repeats))
        found += _absolute(ours, setting, batch, dtype, found[-1].seconds["bigbatch"])
    return found


def _absolute(
    ours: BareUpdate, setting: str, batch: int, dtype: str, seconds: list[float]
) -> list[Measurement]:
    """Examples a second, and the share of the chip's peak where that is known."""
    flops = compilation.count_flops(ours.lowered[0])
    peak = chips.peak_flops(jax.devices()[0].device_kind, dtype)
    found = [Measurement("examples a second", setting, "", "examples/s",
                         [round(batch / second, 1) for second in seconds])]
    if peak and flops:
        found.append(Measurement("share of the chip's peak", setting, "", "x",
                                 [round(flops / second / peak, 4) for second in seconds]))
    return found


def _tolerance() -> float:
    """The share by which equal losses may differ in the dtype of the updates."""
    return 0.02 if on_gpu() else 1e-4
