"""The noise scale of a gradient, measured: how many examples must be added up to be over the noise.

The gradient of one example has a mean G and a covariance Sigma over the examples. Their quotient

    B_simple = tr(Sigma) / |G|^2

is a number of examples (McCandlish et al., "An Empirical Model of Large-Batch Training", 2018,
equation 2.9). A batch far below it makes steps of noise, and one far above it repeats what it knows
already.

Both parts follow from an update that was added up in groups. A group i of examples has the summed
gradient s_i and the summed weight w_i. Its mean is w_i G, as the objective is a mean over weights.
With S = sum s_i, W = sum w_i, A = sum w_i^2, and n examples in all,

    |G|^2     = (|S|^2 - sum |s_i|^2) / (W^2 - A)
    tr(Sigma) = n (sum |s_i|^2 - A |G|^2) / W^2

are unbiased where the groups are independent of each other, whatever their sizes are: the first is
the mean product of two groups, and the second is n times the variance of the mean gradient S/W. For
equal groups they are those of appendix A.1 there. An empty group adds nothing. A single group has
no other to be compared with, and both parts are nan. Neither is bound to be over 0.

Two divisions into groups are used. Devices and passes make groups that exist anyway, but other ones
on other hardware. Within a pass, each ghost batch (each example, where no ghost batch is normalised
together) can be given its own copy of the scales and biases of the normalisation layers: the slopes
of the copies are the gradients of the groups, for these parameters alone. They depend on no
hardware. Gray et al., "Normalization Layer Per-Example Gradients are Sufficient to Predict Gradient
Noise Scale in Transformers", NeurIPS 2024, found that they tell the whole.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bigbatch.schedule.smoothing import Smoothed, scale_of
from bigbatch.update.totals import totals

Tree = Any


class Groups(NamedTuple):
    """What some groups of examples add up to; scalars, and those of more groups are added to it."""

    squares: jax.Array  # sum |s_i|^2
    weights: jax.Array  # sum w_i^2
    count: jax.Array  # groups that weigh something


class Parts(NamedTuple):
    """The two parts of a noise scale, for the mean gradient and for an example; scalars."""

    gradient_square: jax.Array  # |G|^2
    trace: jax.Array  # tr(Sigma)


class Measured(NamedTuple):
    """The noise of one update, or of examples that were only measured."""

    by_norms: Parts | None  # by the scales and biases of the norms; None if they have no copies
    by_groups: Parts | None  # by devices and passes; None where these are not measured
    groups: jax.Array | None  # how many of these weigh something


def squared_norm(arrays: Iterable[jax.Array]) -> jax.Array:
    """The sum of the squares of all numbers."""
    return sum(totals(map(jnp.square, arrays)))


def _apart(gradient: Tree) -> Tree:
    """The gradient, such that a TPU's compiler makes what follows no part of its computation.

    It would do so with squares of gradients, and the convolutions that these come from would then
    take longer: an update of a Wide ResNet 16-4 on v5e by 2.1 %.
    """
    return jax.lax.platform_dependent(
        gradient, tpu=jax.lax.optimization_barrier, default=lambda tree: tree)


def one_group(gradient: Tree, weight: jax.Array) -> Groups:
    """A group by itself: its summed gradient and its weight."""
    gradient = _apart(gradient)
    return Groups(squared_norm(jax.tree.leaves(gradient)), jnp.square(weight),
                  (weight != 0).astype(weight.dtype))


def with_copies(params: Tree, copied: Tree, groups: int) -> Tree:
    """The parameters, where those that `copied` marks have `groups` copies on a leading axis."""
    return jax.tree.map(
        lambda leaf, copy: jnp.broadcast_to(leaf, (groups, *leaf.shape)) if copy else leaf,
        params, copied)


def without_copies(
    gradient: Tree, copied: Tree, weights_B: jax.Array, examples: int
) -> tuple[Tree, Groups]:
    """The gradient by the parameters themselves, and what the groups with copies add up to.

    Args:
        gradient: by the parameters of `with_copies`.
        copied: marks those that have copies.
        weights_B: the weight of each example in the objective; 0 for what does not count.
        examples: of a group, neighbours.
    """
    weights_G = weights_B.reshape(-1, examples).sum(axis=1)
    slopes = only(gradient, copied)
    # Layer norms stand between products, and ghost batch norms between convolutions. By v5e's
    # compiler a small transformer takes 2.3 % longer without this, and a Wide ResNet 2.9 % with it.
    slopes = _apart(slopes) if examples == 1 else slopes
    groups = Groups(squared_norm(slopes), jnp.sum(jnp.square(weights_G)),
                    jnp.sum(weights_G != 0).astype(weights_G.dtype))
    left = iter(slopes)
    summed = jax.tree.map(
        lambda leaf, copy: next(left).sum(axis=0) if copy else leaf, gradient, copied)
    return summed, groups


def only(tree: Tree, copied: Tree) -> list[jax.Array]:
    """The leaves of a tree like the parameters that `copied` marks."""
    return [leaf for leaf, copy in zip(*map(jax.tree.leaves, (tree, copied)), strict=True) if copy]


def estimate(
    square: jax.Array, weight: jax.Array, examples: jax.Array, groups: Groups
) -> Parts:
    """The parts of the noise scale, by the formulas above.

    Args:
        square: |S|^2, of the gradient summed over all groups and not divided by their weight.
        weight: W.
        examples: n, those that count.
        groups: what the groups add up to.
    """
    pairs = jnp.square(weight) - groups.weights
    # Where one group has all the weight, W^2 - A is a rounding error: 0/0 says that in its place.
    pairs = jnp.where(groups.count > 1, pairs, 0)
    products = jnp.where(groups.count > 1, square - groups.squares, 0)
    of_mean = products / pairs
    trace = examples * (groups.squares - groups.weights * of_mean) / jnp.square(weight)
    return Parts(of_mean, trace)


def line(measured: Measured, smoothed: Smoothed) -> dict[str, float | None]:
    """What metrics.jsonl has of every update: the same on any hardware.

    Args:
        measured: of the update.
        smoothed: after it.

    Returns:
        `noise_measured`, of `smoothed`, and both parts of this update alone; {} without copies.
    """
    if measured.by_norms is None:
        return {}
    return {"noise_measured": smoothed.scale, **_parts("noise", measured.by_norms)}


def line_of_ghosts(measured: Measured) -> dict[str, float | None]:
    """What metrics.jsonl has of ghost batches that were measured one by one.

    Returns:
        `noise_full` and its parts, by all parameters, and beside it the parts by the norms.
    """
    norms = {} if measured.by_norms is None else _parts("noise_norms", measured.by_norms)
    return {"noise_full": scale_of(measured.by_groups),
            **_parts("noise_full", measured.by_groups), **norms}


def _parts(name: str, parts: Parts) -> dict[str, float]:
    return {f"{name}_gradient_square": float(parts.gradient_square),
            f"{name}_trace": float(parts.trace)}
