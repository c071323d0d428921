"""Wide residual networks, WRN-d-k.

Zagoruyko & Komodakis, "Wide Residual Networks", BMVC 2016: pre-activation blocks of two 3x3
convolutions in three groups of width 16k, 32k, 64k. WRN-16-4 has 2 748 890 parameters.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from bigbatch.mistake import Mistake
from bigbatch.models.blocks import Blocks
from bigbatch.models.dropout import dropout
from bigbatch.models.normalization import GhostBatchNorm

# He et al. 2015, fan-in, a normal distribution that is not truncated.
he_normal = nnx.initializers.variance_scaling(2.0, "fan_in", "normal")


class Block(nnx.Module):
    """BN-ReLU-conv3-BN-ReLU-conv3, added to the input or to its strided 1x1 projection."""

    def __init__(
        self, inputs: int, outputs: int, stride: int, rate: float, tag: int,
        conv: Callable[..., nnx.Module], norm: Callable[..., nnx.Module],
    ):
        self.norm1 = norm(inputs)
        self.conv1 = conv(inputs, outputs, 3, stride)
        self.norm2 = norm(outputs)
        self.conv2 = conv(outputs, outputs, 3)
        # A block that keeps the width has stride 1, so its shortcut is the input itself.
        self.project = conv(inputs, outputs, 1, stride) if inputs != outputs else None
        self.rate, self.tag = rate, tag

    def __call__(self, x: jax.Array, train: bool, keys_B: jax.Array) -> jax.Array:
        active = nnx.relu(self.norm1(x, train))
        y = nnx.relu(self.norm2(self.conv1(active), train))
        y = self.conv2(dropout(y, self.rate, keys_B, train, self.tag))
        return y + (x if self.project is None else self.project(active))


class WideResNet(nnx.Module):
    """WRN-`depth`-`width` for small images (CIFAR's 32x32, the digits' 8x8)."""

    def __init__(
        self,
        num_classes: int,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
        *,
        ghost_size: int,
        depth: int = 16,
        width: int = 4,
        channels: int = 3,
        first_features: int = 16,
        bn_decay: float = 0.9,
        dropout_rate: float = 0.0,
        same_padding: bool = False,
    ):
        """Args:
        num_classes: outputs.
        dtype: to compute in; parameters are float32 (float64 for float64).
        rngs: Flax's random streams; `params` is used.
        ghost_size: examples in a ghost batch.
        depth: 6n + 4, with n blocks in each of the three groups.
        width: k, the factor on the 16, 32, 64 features of the groups.
        channels: of the images.
        first_features: of the first convolution; 16 in the paper.
        bn_decay: the share of a running statistic that remains after one ghost batch.
        dropout_rate: of the dropout between a block's two convolutions.
        same_padding: True only to continue runs of version 0.1, whose convolutions of stride 2
            had a padding of (0, 1).

        Raises:
            Mistake: if there is no network of this depth or width.
        """
        if depth < 10 or (depth - 4) % 6:
            raise Mistake(
                f"model.depth is {depth}; a Wide ResNet's is 6n + 4 with n blocks a group: "
                "10, 16, 22, 28, 34, 40..."
            )
        if width < 1:
            raise Mistake(f"model.width is {width}; it must be 1 or more.")
        param_dtype = jnp.promote_types(dtype, jnp.float32)
        norm = partial(GhostBatchNorm, ghost_size=ghost_size, decay=bn_decay, dtype=dtype,
                       rngs=rngs)

        def conv(inputs: int, outputs: int, size: int, strides: int = 1) -> nnx.Conv:
            # Equal padding on both sides, as in the paper's own code. With a stride of 2, SAME
            # would pad one side by a pixel more, which is another network.
            padding = "SAME" if same_padding else size // 2
            return nnx.Conv(inputs, outputs, (size, size), strides=strides, padding=padding,
                            use_bias=False, kernel_init=he_normal, dtype=dtype,
                            param_dtype=param_dtype, rngs=rngs)

        blocks = (depth - 4) // 6
        self.conv = conv(channels, first_features, 3)
        features = first_features
        self.blocks = Blocks([])
        for group, outputs in enumerate((16 * width, 32 * width, 64 * width)):
            for index in range(blocks):
                stride = 2 if group > 0 and index == 0 else 1
                tag = len(self.blocks)
                self.blocks.append(Block(features, outputs, stride, dropout_rate, tag, conv, norm))
                features = outputs
        self.norm = norm(features)
        self.head = nnx.Linear(features, num_classes, dtype=param_dtype, param_dtype=param_dtype,
                               kernel_init=he_normal, rngs=rngs)

    def __call__(self, images_BxHxWxC: jax.Array, train: bool, keys_B: jax.Array) -> jax.Array:
        """Logits (batch, classes), in the parameters' type.

        Raises:
            Mistake: if the images have another number of channels.
        """
        if images_BxHxWxC.shape[-1] != self.conv.in_features:
            raise Mistake(
                f"model.channels is {self.conv.in_features}, but the images have "
                f"{images_BxHxWxC.shape[-1]} (data.mean and data.std have one value a channel)."
            )
        x = self.conv(images_BxHxWxC)
        for block in self.blocks.calls():
            x = block(x, train, keys_B)
        x = nnx.relu(self.norm(x, train)).mean(axis=(1, 2), dtype=self.head.dtype)
        return self.head(x)
