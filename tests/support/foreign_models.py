"""Models as a package of a user's own would hold them; a config names them by dotted path."""

import jax
import jax.numpy as jnp
from flax import linen, nnx

from bigbatch.models.dropout import dropout
from bigbatch.models.normalization import GhostBatchNorm


class Regression(nnx.Module):
    """Softmax regression on the pixels; with a second one as an auxiliary head, if it weighs."""

    def __init__(
        self, num_classes: int, dtype: jnp.dtype, rngs: nnx.Rngs, *, pixels: int = 64,
        auxiliary_weight: float = 0.0,
    ):
        def linear() -> nnx.Linear:
            return nnx.Linear(pixels, num_classes, dtype=dtype, rngs=rngs,
                              param_dtype=jnp.promote_types(dtype, jnp.float32))

        self.head, self.auxiliary = linear(), linear() if auxiliary_weight else None
        self.auxiliary_weight = auxiliary_weight

    def __call__(self, images: jax.Array, train: bool, keys: jax.Array):
        pixels_BxP = images.reshape(len(images), -1)
        if train and self.auxiliary is not None:
            weighted = (self.auxiliary_weight, self.auxiliary(pixels_BxP))
            return self.head(pixels_BxP), [weighted]
        return self.head(pixels_BxP)


class ConvNet(nnx.Module):
    """For images of 8x8: two convolutions, each with ghost batch normalisation and dropout."""

    def __init__(
        self, num_classes: int, dtype: jnp.dtype, rngs: nnx.Rngs, *, ghost_size: int,
        features: int = 8, dropout_rate: float = 0.0, norm: type[nnx.Module] = GhostBatchNorm,
    ):
        types = {"dtype": dtype, "param_dtype": jnp.promote_types(dtype, jnp.float32)}
        self.conv1 = nnx.Conv(1, features, (3, 3), strides=2, **types, rngs=rngs)
        self.conv2 = nnx.Conv(features, features, (3, 3), use_bias=False, **types, rngs=rngs)
        self.norm1, self.norm2 = (
            norm(features, ghost_size=ghost_size, dtype=dtype, rngs=rngs) for _ in range(2)
        )
        self.head = nnx.Linear(16 * features, num_classes, **types, rngs=rngs)
        self.dropout_rate = dropout_rate

    def __call__(self, images: jax.Array, train: bool, keys: jax.Array) -> jax.Array:
        x = nnx.relu(self.norm1(self.conv1(images), train))
        x = dropout(x, self.dropout_rate, keys, train, tag=0)
        x = nnx.relu(self.norm2(self.conv2(x), train))
        x = dropout(x, self.dropout_rate, keys, train, tag=1)
        return self.head(x.reshape(len(x), -1))


class LinenNet(linen.Module):
    """Linen, with an NNX layer inside."""

    num_classes: int
    dtype: jnp.dtype
    ghost_size: int

    @linen.compact
    def __call__(self, images: jax.Array, train: bool, keys: jax.Array) -> jax.Array:
        types = {"dtype": self.dtype, "param_dtype": jnp.promote_types(self.dtype, jnp.float32)}
        x = linen.Conv(8, (3, 3), strides=2, **types)(images)
        x = nnx.bridge.ToLinen(
            GhostBatchNorm, (8,), {"ghost_size": self.ghost_size, "dtype": self.dtype}
        )(x, train)
        x = linen.relu(x).reshape(len(x), -1)
        x = linen.LayerNorm(name="last", **types)(x)
        return linen.Dense(self.num_classes, **types)(x)


class FromLinen(nnx.Module):
    """`LinenNet` through Flax's bridge."""

    def __init__(self, num_classes: int, dtype: jnp.dtype, rngs: nnx.Rngs, *, ghost_size: int):
        net = LinenNet(num_classes, dtype, ghost_size)
        images = jnp.zeros((1, 8, 8, 1), dtype)
        self.net = nnx.bridge.ToNNX(net, rngs=rngs).lazy_init(images, False, None)

    def __call__(self, images: jax.Array, train: bool, keys: jax.Array) -> jax.Array:
        return self.net(images, train, keys, mutable=["batch_stats"] if train else False)
