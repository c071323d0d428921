"""The sum of all numbers of many arrays, in few operations."""

from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp


def totals(arrays: Iterable[jax.Array]) -> Iterator[jax.Array]:
    """The sums of all numbers, of arrays of one shape together.

    Those are added first, since the sum of each array is a separate operation, and there would be
    hundreds of them.
    """
    by_shape: dict[tuple[int, ...], jax.Array] = {}
    for array in arrays:
        by_shape[array.shape] = by_shape.get(array.shape, 0) + array
    yield from map(jnp.sum, by_shape.values())
