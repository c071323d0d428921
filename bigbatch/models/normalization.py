"""Ghost batch normalisation, with running statistics that count examples and not updates.

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
        # What the update has to know of a statistic goes with it.
        known = {"decay": decay, "ghost_size": ghost_size}
        self.mean = nnx.BatchStat(jnp.zeros((num_features,), param_dtype), **known)
        self.var = nnx.BatchStat(jnp.ones((num_features,), param_dtype), **known)

    def __call__(self, inputs: jax.Array, train: bool) -> jax.Array:
        """Normalises `inputs` (batch, ..., features).

        Raises:
            Mistake: in training, when the batch is no whole number of ghost batches.
        """
        if train and len(inputs) % self.ghost_size:
            raise Mistake(
                f"GhostBatchNorm got {len(inputs)} examples, no whole number of ghost batches of "
                f"{self.ghost_size}."
            )
        outputs, mean, var = _normalise(
            inputs, None if self.scale is None else self.scale[...], self.bias[...],
            None if train else (self.mean[...], self.var[...]), self.ghost_size, self.epsilon,
        )
        if train:
            # `[...] =` would keep the shape; these gain the axis of ghosts.
            self.mean.set_value(mean)
            self.var.set_value(var)
        return outputs.astype(self.dtype)


# Jitted so that it is traced once for all layers of a shape. Inline, since with calls left in the
# program the TPU's compiler fuses less (an update of ResNet-50 takes 1.15 times as long by its
# word).
@partial(jax.jit, static_argnames=("ghost_size", "epsilon"), inline=True)
def _normalise(
    inputs: jax.Array, scale: jax.Array | None, bias: jax.Array,
    running: tuple[jax.Array, jax.Array] | None, ghost_size: int, epsilon: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The outputs, in the type of the bias, and the mean and variance: those `running`, or where
    there are none of each ghost batch (ghosts x features).
    """
    batch, features = inputs.shape[0], inputs.shape[-1]
    x_BxPxC = inputs.astype(bias.dtype)
    pixels = tuple(range(1, inputs.ndim - 1))

    # XLA on CPU takes one long sum an order of magnitude more slowly than one over pixels and one
    # over examples. And only these small sums are viewed by ghost batch: were activations, it would
    # work out what made them (a block's sum) once more for each that reads them.
    def over_ghosts(x_BxPxC: jax.Array) -> jax.Array:
        return x_BxPxC.mean(pixels).reshape(-1, ghost_size, features).mean(axis=1)

    def to_examples(rows_GxC: jax.Array) -> jax.Array:
        rows_BxC = jnp.repeat(rows_GxC, ghost_size, axis=0)
        return rows_BxC.reshape(batch, *[1] * len(pixels), features)

    if running is None:
        mean = over_ghosts(x_BxPxC)
        # One pass over the activations; the clamp only meets rounding on constant features.
        var = jnp.maximum(over_ghosts(jnp.square(x_BxPxC)) - jnp.square(mean), 0.0)
    else:
        mean, var = running
    gain = jax.lax.rsqrt(var + epsilon)
    if scale is not None:
        gain = gain * scale
    shift = bias - mean * gain
    if running is None:
        gain, shift = to_examples(gain), to_examples(shift)
    # One multiplication and one addition an activation. That it rounds at the size of the mean
    # matters less than that the variance does.
    return x_BxPxC * gain + shift, mean, var


def fold_weights(ghosts_after_G: jax.Array, decay: float, dtype: jnp.dtype) -> jax.Array:
    """How much each ghost batch of an update adds to a running statistic.

    Folding k ghost batches one after the other, r <- d r + (1-d) s, is in closed form
    r <- d^k r + sum_i (1-d) d^(k-1-i) s_i with i the ghost batch's place in the global batch.

    Args:
        ghosts_after_G: k-1-i for each ghost batch; negative for a padding slot, which adds nothing.
        decay: d, per ghost batch.
        dtype: of the weights.
    """
    # Through the logarithm taken in double precision: d^k with a rounded d loses digits with k.
    weights = (1.0 - decay) * jnp.exp(ghosts_after_G.astype(dtype) * math.log(decay))
    return jnp.where(ghosts_after_G >= 0, weights, 0.0)
