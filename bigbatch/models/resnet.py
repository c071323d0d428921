"""Residual networks for ImageNet: ResNet-18, -34, -50, -101 and -152.

He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", CVPR 2016, as trained by Goyal
et al., "Accurate, Large Minibatch SGD", 2017: a bottleneck's stride is on its 3x3 convolution
(version 1.5), and each block's last scale (gamma) begins at 0, so that at first every block is only
its shortcut. ResNet-50 has 25 557 032 parameters.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from bigbatch.mistake import Mistake
from bigbatch.models.blocks import Blocks
from bigbatch.models.normalization import GhostBatchNorm

# He et al. 2015, a normal distribution that is not truncated. Goyal et al. do not state the fan;
# Caffe2, with which they trained, uses the fan-out (its MSRAFill).
he_normal = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")

BLOCKS = {  # their number in each of the four groups, by depth
    18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3),
}
BOTTLENECK_FROM = 50  # the depth from which blocks are bottlenecks


class Block(nnx.Module):
    """relu(shortcut + convolutions): 3x3 twice, or (bottleneck) 1x1, 3x3, 1x1 to 4 times the width.

    Each convolution is followed by BN, with ReLU between them. The shortcut is the input, or its
    strided 1x1 projection with BN if the shape changes.
    """

    def __init__(
        self, inputs: int, width: int, stride: int, bottleneck: bool,
        conv: Callable[..., nnx.Module], norm: Callable[..., nnx.Module],
    ):
        if bottleneck:
            layers = [(width, 1, 1), (width, 3, stride), (4 * width, 1, 1)]
        else:
            layers = [(width, 3, stride), (width, 3, 1)]
        self.outputs = layers[-1][0]
        self.convs, self.norms = nnx.List([]), nnx.List([])
        features = inputs
        for number, (outputs, size, step) in enumerate(layers, start=1):
            last = number == len(layers)
            self.convs.append(conv(features, outputs, size, step))
            self.norms.append(norm(
                outputs, scale_init=nnx.initializers.zeros if last else nnx.initializers.ones
            ))
            features = outputs
        projects = stride != 1 or inputs != self.outputs
        self.project = conv(inputs, self.outputs, 1, stride) if projects else None
        self.project_norm = norm(self.outputs) if projects else None

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        y = x
        for index, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            y = norm(conv(nnx.relu(y) if index else y), train)
        if self.project is not None:
            x = self.project_norm(project(x, self.project), train)
        return nnx.relu(x + y)


class ResNet(nnx.Module):
    """ResNet-`depth`, version 1.5, for images of 224x224 or any other size."""

    def __init__(
        self,
        num_classes: int,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
        *,
        ghost_size: int,
        depth: int = 50,
        width: int = 64,
        channels: int = 3,
        bn_decay: float = 0.9,
        space_to_depth: bool = False,
    ):
        """Args:
        num_classes: outputs.
        dtype: to compute in; parameters are float32 (float64 for float64).
        rngs: Flax's random streams; `params` is used.
        ghost_size: examples in a ghost batch.
        depth: 18, 34, 50, 101 or 152.
        width: features of the stem and of the first group's 3x3 convolutions; they double with
            each group.
        channels: of the images.
        bn_decay: the share of a running statistic that remains after one ghost batch.
        space_to_depth: whether to compute the first convolution over 2x2 patches of 12 channels.
            Parameters and results are the same. Today's compiler for TPUs gains nothing by it: see
            docs/speed.md.

        Raises:
            Mistake: if there is no network of this depth or width.
        """
        if depth not in BLOCKS:
            raise Mistake(
                f"model.depth is {depth}; a ResNet's is {', '.join(map(str, BLOCKS))}."
            )
        if width < 1:
            raise Mistake(f"model.width is {width}; it must be 1 or more.")
        param_dtype = jnp.promote_types(dtype, jnp.float32)
        norm = partial(GhostBatchNorm, ghost_size=ghost_size, decay=bn_decay, dtype=dtype,
                       rngs=rngs)

        def conv(inputs: int, outputs: int, size: int, stride: int) -> nnx.Conv:
            # Equal padding on both sides: with a stride, SAME would pad one side by a pixel more.
            return nnx.Conv(inputs, outputs, (size, size), strides=stride, padding=size // 2,
                            use_bias=False, kernel_init=he_normal, dtype=dtype,
                            param_dtype=param_dtype, rngs=rngs)

        self.conv = conv(channels, width, 7, 2)
        self.norm = norm(width)
        self.blocks = Blocks([])
        features = width
        for group, count in enumerate(BLOCKS[depth]):
            for index in range(count):
                stride = 2 if group > 0 and index == 0 else 1
                self.blocks.append(Block(features, width * 2**group, stride,
                                         depth >= BOTTLENECK_FROM, conv, norm))
                features = self.blocks[-1].outputs
        self.head = nnx.Linear(features, num_classes, dtype=param_dtype, param_dtype=param_dtype,
                               kernel_init=nnx.initializers.normal(0.01), rngs=rngs)
        self.space_to_depth = space_to_depth

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
        x = images_BxHxWxC.astype(self.conv.dtype)
        x = patch_stem(x, self.conv.kernel[...]) if self.space_to_depth else self.conv(x)
        x = nnx.relu(self.norm(x, train))
        x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        for block in self.blocks.calls():
            x = block(x, train)
        return self.head(x.mean(axis=(1, 2), dtype=self.head.dtype))


def project(x_BxHxWxC: jax.Array, conv: nnx.Conv) -> jax.Array:
    """`conv(x)` for a 1x1 convolution, in the form that the platform's compiler makes most of.

    With a stride of 2 it reads one pixel in four. A TPU's compiler would multiply for the gradient
    by the other three too, whose gradient is 0; see `pick_and_project`.
    """
    if conv.strides == 1:
        return conv(x_BxHxWxC)
    return jax.lax.platform_dependent(
        x_BxHxWxC, tpu=partial(pick_and_project, conv=conv), default=conv)


def pick_and_project(x_BxHxWxC: jax.Array, conv: nnx.Conv) -> jax.Array:
    """`conv(x)` for a 1x1 convolution: takes the pixels that it reads, then has a stride of 1."""
    picked = x_BxHxWxC[:, :: conv.strides, :: conv.strides]
    return jax.lax.conv_general_dilated(
        picked, conv.kernel[...].astype(picked.dtype), (1, 1), "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"))


def patch_stem(images_BxHxWxC: jax.Array, kernel_7x7xCxF: jax.Array) -> jax.Array:
    """The 7x7 convolution with stride 2 and padding 3, as a 4x4 one with stride 1 over patches.

    Output row i reads image rows 2i-3 to 2i+3. A kernel with a row of zeros before it reads 2i-4 to
    2i+3, which are the patches i-2 to i+1: hence a padding of 2 patches before and 1 after. The
    parameter remains the 7x7 kernel, so checkpoints are the same as those of the plain convolution.

    Args:
        images_BxHxWxC: of any size; an odd side gains a row or column of zeros, as from padding.
        kernel_7x7xCxF: of the plain convolution; converted to the type of the images.
    """
    height, width = images_BxHxWxC.shape[1:3]
    images = jnp.pad(images_BxHxWxC, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)))
    return jax.lax.conv_general_dilated(
        _patches(images), patch_kernel(kernel_7x7xCxF).astype(images.dtype), (1, 1),
        ((2, 1), (2, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def patch_kernel(kernel_7x7xCxF: jax.Array) -> jax.Array:
    """The 4x4x4CxF kernel that gives over 2x2 patches what this 7x7 kernel gives over pixels."""
    *_, channels, features = kernel_7x7xCxF.shape
    kernel_8x8xCxF = jnp.pad(kernel_7x7xCxF, ((1, 0), (1, 0), (0, 0), (0, 0)))
    return _patches(kernel_8x8xCxF.transpose(3, 0, 1, 2)).transpose(1, 2, 3, 0)


def _patches(images_BxHxWxC: jax.Array) -> jax.Array:
    """Each 2x2 patch as one pixel of 4C channels, ordered by (row, column, channel)."""
    batch, height, width, channels = images_BxHxWxC.shape
    patches = images_BxHxWxC.reshape(batch, height // 2, 2, width // 2, 2, channels)
    return patches.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height // 2, width // 2, 4 * channels)
