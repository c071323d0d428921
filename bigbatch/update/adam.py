"""Adam for betas that differ from update to update, as they do when kept per example.

Adam's averages begin with 0, and are divided by the weight that gradients have in them (Kingma and
Ba, "Adam", ICLR 2015, section 3). Under one beta this weight is 1 - beta^t after t updates, which
Optax computes from the present beta and t. If a batch has grown on the way, and beta has become
beta^kappa, that would take all earlier updates for ones of the present batch: steps early in
training would be too long by up to sqrt(kappa). So the weights are added up as the averages are.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

Tree = Any


class AdamState(NamedTuple):
    """The averages of gradients and of their squares, each with the weight of what is in it."""

    # The updates so far. Read where an older version saved the state, which had no weights, so that
    # they are nan: the first update then takes those of its own betas, as that version did.
    count: jax.Array
    mu: Tree
    mu_weight: jax.Array
    nu: Tree
    nu_weight: jax.Array


def scale_by_adam(
    b1: jax.typing.ArrayLike, b2: jax.typing.ArrayLike, eps: jax.typing.ArrayLike = 1e-8
) -> optax.GradientTransformation:
    """Optax's `scale_by_adam`, but that `b1` and `b2` may be others at every update.

    Args:
        b1: what an update leaves of the average of gradients.
        b2: what it leaves of the average of their squares.
        eps: added to the root of the latter.
    """
    def init(params: Tree) -> AdamState:
        weight = jnp.zeros((), jax.tree.leaves(params)[0].dtype)
        zeros = optax.tree.zeros_like(params)
        return AdamState(jnp.zeros((), jnp.int32), zeros, weight, zeros, weight)

    def update(gradient: Tree, state: AdamState, params: Tree = None) -> tuple[Tree, AdamState]:
        def weight(before: jax.Array, beta: jax.typing.ArrayLike) -> jax.Array:
            before = jnp.where(jnp.isnan(before), 1 - beta**state.count, before)
            return (beta * before + (1 - beta)).astype(before.dtype)

        new = AdamState(
            optax.safe_increment(state.count),
            optax.tree.update_moment(gradient, state.mu, b1, 1), weight(state.mu_weight, b1),
            optax.tree.update_moment_per_elem_norm(gradient, state.nu, b2, 2),
            weight(state.nu_weight, b2))
        steps = jax.tree.map(
            lambda mu, nu: mu / new.mu_weight / (jnp.sqrt(nu / new.nu_weight) + eps),
            new.mu, new.nu)
        return steps, new

    return optax.GradientTransformation(init, update)
