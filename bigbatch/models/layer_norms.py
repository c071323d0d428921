"""Flax's layer norms, whose scale and bias may come in copies, one for each example of a call.

An update gives them such copies, because the slopes of the copies are the gradients of the examples
(`update.noise`). Everywhere else they are Flax's own.
"""

from collections.abc import Callable

import jax
from flax import nnx


class LayerNorm(nnx.LayerNorm):
    """Flax's layer norm; see above."""

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Normalises inputs (batch, ..., features)."""
        return _by_example(self, super().__call__, inputs)


class RMSNorm(nnx.RMSNorm):
    """Flax's RMS norm; see above."""

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Normalises inputs (batch, ..., features)."""
        return _by_example(self, super().__call__, inputs)


def _by_example(
    norm: nnx.Module, normalise: Callable[[jax.Array], jax.Array], inputs: jax.Array
) -> jax.Array:
    """Normalises the inputs, each example with its own copy of the parameters if they have any."""
    graph, params = nnx.split(norm)
    if all(leaf.ndim == 1 for leaf in jax.tree.leaves(params)):
        return normalise(inputs)
    return jax.vmap(lambda copy, example: nnx.merge(graph, copy)(example))(params, inputs)
