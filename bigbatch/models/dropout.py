"""Dropout with one random key per example: masks do not depend on how a batch is cut up."""

import jax
import jax.numpy as jnp

from bigbatch.mistake import Mistake


def dropout(inputs: jax.Array, rate: float, keys_B: jax.Array, train: bool, tag: int) -> jax.Array:
    """Sets each feature to zero with probability `rate` and divides the others by 1 - rate.

    `flax.nnx.Dropout` draws one mask per call, so an example's mask would depend on its microbatch.
    Here the mask follows from the example's own key.

    Args:
        inputs: (batch, ...).
        rate: probability of dropping a feature, in [0, 1).
        keys_B: one random key per example.
        train: if False, the inputs are returned unchanged.
        tag: a number that differs for each dropout layer of the network, since all of them draw
            from the same keys.

    Raises:
        Mistake: if the rate is out of its range.
    """
    if not 0.0 <= rate < 1.0:
        raise Mistake(f"dropout: rate is {rate}; it must lie in [0, 1).")
    if not train or rate == 0.0:
        return inputs

    def drop_one(key: jax.Array, features: jax.Array) -> jax.Array:
        kept = jax.random.bernoulli(jax.random.fold_in(key, tag), 1.0 - rate, features.shape)
        return jnp.where(kept, features / (1.0 - rate), 0.0).astype(features.dtype)

    return jax.vmap(drop_one)(keys_B, inputs)
