"""Ghost batch normalisation, with running statistics that count examples and not updates.

Hoffer, Hubara, Soudry, "Train longer, generalize better", NeurIPS 2017, section 4.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx


class GhostBatchNorm(nnx.Module):
    """Normalises each ghost batch (`ghost_size` consecutive examples) by its own statistics.

    In training the layer does not average: it leaves `mean` and `var` holding one row for each
    ghost batch it saw (ghosts x features). Which rows count, and in which order they enter the
    running statistics, depends on the whole update, of which a layer sees a part; the update folds
    them (see `fold_weights`). In evaluation `mean` and `var` are the running statistics (features).

    Sums are taken in float32, or in float64 where that is what the network computes in.
    """

    def __init__(
        self,
        num_features: int,
        *,
        ghost_size: int,
        decay: float = 0.9,
        epsilon: float = 1e-5,
        use_scale: bool = True,
        scale_init: Callable = nnx.initializers.ones,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Args:
        num_features: size of the last axis.
        ghost_size: examples in a ghost batch.
        decay: what remains of a running statistic after one ghost batch.
        epsilon: added to the variance.
        use_scale: whether to learn a scale (gamma); the bias (beta) is always learned.
        scale_init: initialiser of the scale.
        dtype: of the output. Parameters and statistics are float32, or float64 for float64.
        rngs: Flax's random streams (for `scale_init`).
        """
        if not 0.0 < decay < 1.0:
            raise ValueError(f"GhostBatchNorm: decay is {decay}; it must lie between 0 and 1.")
        param_dtype = jnp.promote_types(dtype, jnp.float32)
        self.ghost_size = ghost_size
        self.epsilon = epsilon
        self.dtype = dtype
        self.bias = nnx.Param(jnp.zeros((num_features,), param_dtype))
        self.scale = (
            nnx.Param(scale_init(rngs.params(), (num_features,), param_dtype))
            if use_scale
            else None
        )
        # What the update has to know of a statistic goes with it.
        known = {"decay": decay, "ghost_size": ghost_size}
        self.mean = nnx.BatchStat(jnp.zeros((num_features,), param_dtype), **known)
        self.var = nnx.BatchStat(jnp.ones((num_features,), param_dtype), **known)

    def __call__(self, inputs: jax.Array, train: bool) -> jax.Array:
        """Normalises `inputs` (batch, ..., features).

        Raises:
            ValueError: in training, when the batch is no whole number of ghost batches.
        """
        # Not one jitted function that layers of a shape share: that is traced sooner, but the TPU's
        # compiler fuses less of it (an update of ResNet-50 takes 1.15 times as long by its word).
        batch, features = inputs.shape[0], inputs.shape[-1]
        wide = self.bias[...].dtype
        if train:
            if batch % self.ghost_size:
                raise ValueError(
                    f"GhostBatchNorm got {batch} examples, no whole number of ghost batches of "
                    f"{self.ghost_size}."
                )
            x_GxExPxC = inputs.reshape(batch // self.ghost_size, self.ghost_size, -1, features)
            x_GxExPxC = x_GxExPxC.astype(wide)
            mean = _over_ghost(x_GxExPxC)
            # One pass over the activations; the clamp only meets rounding on constant features.
            var = jnp.maximum(_over_ghost(jnp.square(x_GxExPxC)) - jnp.square(mean), 0.0)
            # `[...] =` would keep the shape; these gain the axis of ghosts.
            self.mean.set_value(mean.reshape(-1, features))
            self.var.set_value(var.reshape(-1, features))
        else:
            x_GxExPxC = inputs.reshape(1, batch, -1, features).astype(wide)
            mean, var = self.mean[...], self.var[...]
        gain = jax.lax.rsqrt(var + self.epsilon)
        if self.scale is not None:
            gain = gain * self.scale[...]
        # One multiplication and one addition an activation. That it rounds at the size of the mean
        # matters less than that the variance does.
        outputs = x_GxExPxC * gain + (self.bias[...] - mean * gain)
        return outputs.reshape(inputs.shape).astype(self.dtype)


def _over_ghost(x_GxExPxC: jax.Array) -> jax.Array:
    """The mean over each ghost batch's examples and their pixels, (ghosts, 1, 1, features).

    Over pixels first: XLA on CPU takes one long sum an order of magnitude more slowly.
    """
    return x_GxExPxC.mean(axis=2, keepdims=True).mean(axis=1, keepdims=True)


def fold_weights(ghosts_after_G: jax.Array, decay: float, dtype: jnp.dtype) -> jax.Array:
    """How much each ghost batch of an update adds to a running statistic.

    Folding k ghost batches one after the other, r <- d r + (1-d) s, is in closed form
    r <- d^k r + sum_i (1-d) d^(k-1-i) s_i with i the ghost batch's place in the global batch.

    Args:
        ghosts_after_G: k-1-i for each ghost batch; negative for an empty seat, which adds nothing.
        decay: d, per ghost batch.
        dtype: of the weights.
    """
    # Through the logarithm taken in double precision: d^k with a rounded d loses digits with k.
    weights = (1.0 - decay) * jnp.exp(ghosts_after_G.astype(dtype) * math.log(decay))
    return jnp.where(ghosts_after_G >= 0, weights, 0.0)
