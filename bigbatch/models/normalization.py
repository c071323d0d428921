"""Ghost batch normalisation, with running statistics averaged over examples, not over updates.

Hoffer, Hubara, Soudry, "Train longer, generalize better", NeurIPS 2017, section 4.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from bigbatch.mistake import Mistake


class GhostBatchNorm(nnx.Module):
    """Normalises each ghost batch (`ghost_size` consecutive examples) by its own statistics.

    In evaluation `mean` and `var` are the running statistics (features). In training the layer does
    not update the running statistics: it sets `mean` and `var` to the statistics of each of its
    ghost batches (ghosts x features). The update folds these rows into the running statistics (see
    `fold_weights`), since their weights depend on the whole update, of which a layer sees a part.

    Sums are computed in float32, or in float64 if `dtype` is float64.
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
        decay: the share of a running statistic that remains after one ghost batch, in (0, 1).
        epsilon: added to the variance.
        use_scale: whether to learn a scale (gamma); the bias (beta) is always learned.
        scale_init: initialiser of the scale.
        dtype: of the output. Parameters and statistics are float32, or float64 for float64.
        rngs: Flax's random streams (for `scale_init`).

        Raises:
            Mistake: if the decay is out of its range.
        """
        if not 0.0 < decay < 1.0:
            raise Mistake(f"GhostBatchNorm: decay is {decay}; it must lie between 0 and 1.")
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
        # Metadata that `update.network.build` reads.
        known = {"decay": decay, "ghost_size": ghost_size}
        self.mean = nnx.BatchStat(jnp.zeros((num_features,), param_dtype), **known)
        self.var = nnx.BatchStat(jnp.ones((num_features,), param_dtype), **known)

    def __call__(self, inputs: jax.Array, train: bool) -> jax.Array:
        """Normalises `inputs` (batch, ..., features).

        Raises:
            Mistake: in training, if the batch is not a whole number of ghost batches.
        """
        if train and len(inputs) % self.ghost_size:
            raise Mistake(
                f"GhostBatchNorm got {len(inputs)} examples, no whole number of ghost batches of "
                f"{self.ghost_size}; call it with the whole batch, its examples on the first axis."
            )
        outputs, mean, var = _normalise(
            inputs, None if self.scale is None else self.scale[...], self.bias[...],
            None if train else (self.mean[...], self.var[...]), self.ghost_size, self.epsilon,
        )
        if train:
            # `[...] =` would keep the old shape; the new values have an axis of ghost batches.
            self.mean.set_value(mean)
            self.var.set_value(var)
        return outputs.astype(self.dtype)


# Jitted so that it is traced once for all layers of a shape. Inlined, since the TPU's compiler
# fuses less across calls (it then estimates 1.15 times the time for an update of ResNet-50).
@partial(jax.jit, static_argnames=("ghost_size", "epsilon"), inline=True)
def _normalise(
    inputs: jax.Array, scale: jax.Array | None, bias: jax.Array,
    running: tuple[jax.Array, jax.Array] | None, ghost_size: int, epsilon: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The normalised inputs, in the type of the bias, with the mean and variance that were used.

    These are `running` (features), or if it is None those of each ghost batch (ghosts x features).
    """
    batch, features = inputs.shape[0], inputs.shape[-1]
    x_BxPxC = inputs.astype(bias.dtype)

    def over_ghosts(x_BxPxC: jax.Array) -> jax.Array:
        return jax.lax.platform_dependent(
            x_BxPxC, tpu=partial(means_by_one_sum, ghost_size=ghost_size),
            default=partial(means_by_two_sums, ghost_size=ghost_size))

    def to_examples(rows_GxC: jax.Array) -> jax.Array:
        rows_BxC = jnp.repeat(rows_GxC, ghost_size, axis=0)
        return rows_BxC.reshape(batch, *[1] * (inputs.ndim - 2), features)

    if running is None:
        mean = over_ghosts(x_BxPxC)
        # This form reads the activations once. The maximum only removes rounding errors of constant
        # features.
        var = jnp.maximum(over_ghosts(jnp.square(x_BxPxC)) - jnp.square(mean), 0.0)
    else:
        mean, var = running
    gain = jax.lax.rsqrt(var + epsilon)
    if scale is not None:
        gain = gain * scale
    shift = bias - mean * gain
    if running is None:
        gain, shift = to_examples(gain), to_examples(shift)
    # One multiplication and one addition per activation. Their rounding error is relative to the
    # mean, which matters less than the same in the variance.
    return x_BxPxC * gain + shift, mean, var


def means_by_one_sum(x_BxPxC: jax.Array, ghost_size: int) -> jax.Array:
    """The mean of each ghost batch and feature (ghosts x features), as a TPU sums fastest."""
    x_GxBxPxC = x_BxPxC.reshape(-1, ghost_size, *x_BxPxC.shape[1:])
    return x_GxBxPxC.mean(tuple(range(1, x_BxPxC.ndim)))


def means_by_two_sums(x_BxPxC: jax.Array, ghost_size: int) -> jax.Array:
    """The same by a sum over pixels and one over examples.

    On CPU, XLA computes one long sum ten times more slowly. Only the sums over pixels are reshaped
    by ghost batch: if the activations were, XLA would compute them (a block's sum) again for each
    operation that reads them.
    """
    means_BxC = x_BxPxC.mean(tuple(range(1, x_BxPxC.ndim - 1)))
    return means_BxC.reshape(-1, ghost_size, means_BxC.shape[-1]).mean(axis=1)


def fold_weights(ghosts_after_G: jax.Array, decay: float, dtype: jnp.dtype) -> jax.Array:
    """The weight of each ghost batch of an update in a running statistic.

    Folding k ghost batches one after the other, r <- d r + (1-d) s, has the closed form
    r <- d^k r + sum_i (1-d) d^(k-1-i) s_i, where i is the ghost batch's position in the global
    batch.

    Args:
        ghosts_after_G: k-1-i for each ghost batch; negative for a padding slot, whose weight is 0.
        decay: d, the share of the statistic that remains after one ghost batch.
        dtype: of the weights.
    """
    # By the logarithm, computed in double precision: d^k of a rounded d loses digits as k grows.
    weights = (1.0 - decay) * jnp.exp(ghosts_after_G.astype(dtype) * math.log(decay))
    return jnp.where(ghosts_after_G >= 0, weights, 0.0)
