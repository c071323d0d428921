"""Inception-ResNet-V2.

Szegedy, Ioffe, Vanhoucke, Alemi, "Inception-v4, Inception-ResNet and the Impact of Residual
Connections on Learning", AAAI 2017, with the stem and the widths of tf-slim's
`inception_resnet_v2`, which differ from those of the article's figures. It has 55 813 192
parameters for 1000 classes.

The notation of the stages below: `|` separates parallel branches, whose outputs are concatenated;
f@k is a convolution to f features with a kxk kernel (f@hxw: h rows by w columns); /2 is its stride;
V is VALID padding instead of SAME. Each convolution is followed by BN and ReLU. maxpool is 3x3/2
VALID; avgpool is 3x3/1 SAME and averages over the pixels inside the map only.
"""

import re
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from bigbatch.mistake import Mistake
from bigbatch.models.dropout import dropout
from bigbatch.models.normalization import GhostBatchNorm

STEM = "32@3/2V 32@3V 64@3 maxpool 80@1 192@3V maxpool"
MIXED_5B = "96@1 | 48@1 64@5 | 64@1 96@3 96@3 | avgpool 64@1"
BLOCK35 = "32@1 | 32@1 32@3 | 32@1 48@3 64@3"
MIXED_6A = "384@3/2V | 256@1 256@3 384@3/2V | maxpool"
BLOCK17 = "192@1 | 128@1 160@1x7 192@7x1"
MIXED_7A = "256@1 384@3/2V | 256@1 288@3/2V | 256@1 288@3 320@3/2V | maxpool"
BLOCK8 = "192@1 | 192@1 224@1x3 256@3x1"
CONV_7B = "1536@1"

# The attributes that hold the stages, in the order of the forward pass.
STAGES = ("stem", "mixed_5b", "block35", "mixed_6a", "block17", "mixed_7a", "block8", "conv_7b")

EPSILON = 1e-3  # of the normalisation, tf-slim's
SMALLEST = 75  # side of an image that mixed_7a reduces to one pixel
SMALLEST_AUXILIARY = 107  # side of an image that the auxiliary head's pooling reduces to one pixel
DIVISORS = (1, 2, 4, 8, 16)  # the common divisors of all widths above


def _max_pool(x: jax.Array, train: bool) -> jax.Array:
    return nnx.max_pool(x, (3, 3), strides=(2, 2))


def _average_pool(x: jax.Array, train: bool) -> jax.Array:
    return nnx.avg_pool(x, (3, 3), strides=(1, 1), padding="SAME", count_include_pad=False)


_POOLS = {"maxpool": _max_pool, "avgpool": _average_pool}


class ConvBN(nnx.Module):
    """A convolution with BN and ReLU, described in the notation above, as "384@3/2V"."""

    def __init__(
        self, inputs: int, layer: str, divisor: int,
        conv: Callable[..., nnx.Module], norm: Callable[..., nnx.Module],
    ):
        features, height, width, stride, valid = re.fullmatch(
            r"(\d+)@(\d+)(?:x(\d+))?(/2)?(V)?", layer
        ).groups()
        self.outputs = int(features) // divisor
        self.conv = conv(
            inputs, self.outputs, (int(height), int(width or height)),
            strides=2 if stride else 1, padding="VALID" if valid else "SAME", use_bias=False,
        )
        self.norm = norm(self.outputs)

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        return nnx.relu(self.norm(self.conv(x), train))


class Mixed(nnx.Module):
    """Parallel branches of convolutions and poolings, whose outputs are concatenated."""

    def __init__(
        self, inputs: int, branches: str, divisor: int,
        conv: Callable[..., nnx.Module], norm: Callable[..., nnx.Module],
    ):
        self.branches = nnx.List([])
        self.outputs = 0
        for branch in branches.split("|"):
            layers, features = nnx.List([]), inputs
            for layer in branch.split():
                if layer in _POOLS:
                    layers.append(_POOLS[layer])
                else:
                    layers.append(ConvBN(features, layer, divisor, conv, norm))
                    features = layers[-1].outputs
            self.branches.append(layers)
            self.outputs += features

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        outputs = []
        for layers in self.branches:
            y = x
            for layer in layers:
                y = layer(y, train)
            outputs.append(y)
        return jnp.concatenate(outputs, axis=-1)


class Residual(nnx.Module):
    """relu(x + scale * up(branches(x))); `up` is a 1x1 convolution with a bias and without BN."""

    def __init__(
        self, inputs: int, branches: str, scale: float, mixed: Callable[..., Mixed],
        conv: Callable[..., nnx.Module], activate: bool = True,
    ):
        self.mixed = mixed(inputs, branches)
        self.up = conv(self.mixed.outputs, inputs, (1, 1))
        self.scale, self.activate = scale, activate

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = x + self.scale * self.up(self.mixed(x, train))
        return nnx.relu(x) if self.activate else x


class Residuals(nnx.Module):
    """A sequence of residual blocks."""

    def __init__(self, blocks: list[Residual]):
        self.blocks = nnx.List(blocks)

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        for block in self.blocks:
            x = block(x, train)
        return x


class AuxiliaryHead(nnx.Module):
    """A second classifier after block17.

    Average pooling 5x5/3 VALID, 128@1, a convolution to 768 features whose kernel covers the whole
    map, and a dense layer.
    """

    def __init__(
        self, inputs: int, image_size: int, mixed: Callable[..., Mixed],
        dense: Callable[..., nnx.Module],
    ):
        side = (image_size - SMALLEST_AUXILIARY) // 48 + 1
        self.convolutions = mixed(inputs, f"128@1 768@{side}V")
        self.head = dense(self.convolutions.outputs)

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = nnx.avg_pool(x, (5, 5), strides=(3, 3))
        x = self.convolutions(x, train)
        return self.head(x.reshape(len(x), -1))


class InceptionResNetV2(nnx.Module):
    """Inception-ResNet-V2 for images of 299x299, or of any other size from 75x75 upwards.

    Convolutions and dense layers have tf-slim's default initialiser, Glorot & Bengio's uniform one
    (2010); biases begin at 0.
    """

    def __init__(
        self,
        num_classes: int,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
        *,
        ghost_size: int,
        channels: int = 3,
        bn_decay: float = 0.9997,
        bn_scale: bool = False,
        dropout_rate: float = 0.2,
        auxiliary_weight: float = 0.0,
        image_size: int = 299,
        blocks: tuple[int, int, int] = (10, 20, 10),
        divisor: int = 1,
    ):
        """Args:
        num_classes: outputs.
        dtype: to compute in; parameters are float32 (float64 for float64).
        rngs: Flax's random streams; `params` is used.
        ghost_size: examples in a ghost batch.
        channels: of the images.
        bn_decay: the share of a running statistic that remains after one ghost batch; by default
            tf-slim's.
        bn_scale: whether the normalisation learns a scale (30 272 more parameters).
        dropout_rate: of the dropout before the dense layer; tf-slim keeps a share of 0.8.
        auxiliary_weight: of the auxiliary head's loss, in tf-slim 0.4; 0 leaves the head out. The
            head has 3 366 760 parameters at 299x299.
        image_size: side of the images in training. Read only by the auxiliary head, whose last
            convolution is as large as its map.
        blocks: the numbers of block35, block17 and block8. The last block8 adds its branches
            unscaled and has no ReLU.
        divisor: divides all widths; 1, or 2, 4, 8 or 16 for a smaller network of the same form.

        Raises:
            Mistake: if `blocks`, `divisor`, `auxiliary_weight` or `image_size` is out of its range.
        """
        if len(blocks) != 3 or not all(isinstance(n, int) and n >= 1 for n in blocks):
            raise Mistake(
                f"model.blocks is {blocks!r}; it must be three whole numbers of 1 or more, of "
                "block35, block17 and block8, as (10, 20, 10)."
            )
        if divisor not in DIVISORS:
            raise Mistake(
                f"model.divisor is {divisor}; it must divide every width of the network: "
                f"{', '.join(map(str, DIVISORS))}."
            )
        if auxiliary_weight < 0:
            raise Mistake(f"model.auxiliary_weight is {auxiliary_weight}; it must be 0 or more.")
        if auxiliary_weight and image_size < SMALLEST_AUXILIARY:
            raise Mistake(
                f"model.image_size is {image_size}; with the auxiliary head it must be "
                f"{SMALLEST_AUXILIARY} or more. model.auxiliary_weight=0 leaves that head out."
            )
        param_dtype = jnp.promote_types(dtype, jnp.float32)
        layer = {
            "param_dtype": param_dtype, "kernel_init": nnx.initializers.glorot_uniform(),
            "rngs": rngs,
        }
        conv = partial(nnx.Conv, dtype=dtype, **layer)
        norm = partial(GhostBatchNorm, ghost_size=ghost_size, decay=bn_decay, epsilon=EPSILON,
                       use_scale=bn_scale, dtype=dtype, rngs=rngs)
        dense = partial(nnx.Linear, out_features=num_classes, dtype=param_dtype, **layer)
        mixed = partial(Mixed, divisor=divisor, conv=conv, norm=norm)
        residual = partial(Residual, mixed=mixed, conv=conv)

        self.stem = mixed(channels, STEM)
        self.mixed_5b = mixed(self.stem.outputs, MIXED_5B)
        features = self.mixed_5b.outputs
        self.block35 = Residuals([residual(features, BLOCK35, 0.17) for _ in range(blocks[0])])
        self.mixed_6a = mixed(features, MIXED_6A)
        features = self.mixed_6a.outputs
        self.block17 = Residuals([residual(features, BLOCK17, 0.1) for _ in range(blocks[1])])
        self.auxiliary = (
            AuxiliaryHead(features, image_size, mixed, dense) if auxiliary_weight else None
        )
        self.mixed_7a = mixed(features, MIXED_7A)
        features = self.mixed_7a.outputs
        self.block8 = Residuals([
            *(residual(features, BLOCK8, 0.2) for _ in range(blocks[2] - 1)),
            residual(features, BLOCK8, 1.0, activate=False),
        ])
        self.conv_7b = mixed(features, CONV_7B)
        self.head = dense(self.conv_7b.outputs)
        self.channels, self.dropout_rate = channels, dropout_rate
        self.auxiliary_weight, self.image_size = auxiliary_weight, image_size

    def __call__(
        self, images_BxHxWxC: jax.Array, train: bool, keys_B: jax.Array
    ) -> jax.Array | tuple[jax.Array, list[tuple[float, jax.Array]]]:
        """Logits (batch, classes), in the parameters' type.

        In training with the auxiliary head: (logits, [(auxiliary_weight, auxiliary logits)]).

        Raises:
            Mistake: if the images have another number of channels or are smaller than 75x75, or if
                the auxiliary head is used and they are not of `image_size`.
        """
        height, width, channels = images_BxHxWxC.shape[1:]
        if channels != self.channels:
            raise Mistake(
                f"model.channels is {self.channels}, but the images have {channels} (data.mean and "
                "data.std have one value a channel)."
            )
        if min(height, width) < SMALLEST:
            raise Mistake(
                f"Inception-ResNet-V2 got images of {height}x{width}; the smallest allowed are "
                f"{SMALLEST}x{SMALLEST}, since convolutions without padding shrink them."
            )
        with_auxiliary = train and self.auxiliary is not None
        if with_auxiliary and (height, width) != (self.image_size, self.image_size):
            raise Mistake(
                f"model.image_size is {self.image_size}, but the images are {height}x{width}; the "
                "auxiliary head fits one size only: set "
                "model.image_size=config.data.get_ref('image_size')."
            )
        x, auxiliary = images_BxHxWxC, []
        for name in STAGES:
            x = getattr(self, name)(x, train)
            if name == "block17" and with_auxiliary:
                auxiliary = [(self.auxiliary_weight, self.auxiliary(x, train))]
        x = x.mean(axis=(1, 2), dtype=self.head.dtype)
        logits = self.head(dropout(x, self.dropout_rate, keys_B, train, tag=0))
        return (logits, auxiliary) if auxiliary else logits
