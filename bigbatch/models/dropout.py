"""Dropout with one key an example: the masks do not depend on how a batch is cut up."""

import jax
import jax.numpy as jnp

from bigbatch.mistake import Mistake


def dropout(inputs: jax.Array, rate: float, keys_B: jax.Array, train: bool, tag: int) -> jax.Array:
    """Sets a share `rate` of each example's features to zero and scales up the others.

    `flax.nnx.Dropout` draws one mask a call, so an example's mask would change with the
    microbatch it lands in; here it follows from the example's own key.

    Args:
        inputs: (batch, ...).
        rate: share dropped, in [0, 1).
        keys_B: one random key an example.
        train: outside training the inputs are returned as they are.
        tag: tells this place in the network from the others that draw from the same keys.
    """
    if not 0.0 <= rate < 1.0:
        raise Mistake(f"dropout: rate is {rate}; it must lie in [0, 1).")
    if not train or rate == 0.0:
        return inputs

    def drop_one(key: jax.Array, features: jax.Array) -> jax.Array:
        kept = jax.random.bernoulli(jax.random.fold_in(key, tag), 1.0 - rate, features.shape)
        return jnp.where(kept, features / (1.0 - rate), 0.0).astype(features.dtype)

    return jax.vmap(drop_one)(keys_B, inputs)
