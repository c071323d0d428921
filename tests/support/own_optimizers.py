"""Optimizers as a package of a user's own would hold them; a config names them by dotted path."""

import jax
import jax.numpy as jnp
import optax

from bigbatch.update.adam import scale_by_adam


def lars(momentum, weight_decay):
    """You et al. 2017, as `optax.lars` has it."""
    return optax.chain(
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_trust_ratio(trust_coefficient=0.001),
        optax.trace(momentum),
    )


def lamb(b1, b2, weight_decay):
    """You et al. 2020, as `optax.lamb` has it."""
    return optax.chain(
        scale_by_adam(b1, b2, eps=1e-6),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_trust_ratio(),
    )


def muon(beta, b2):
    """Muon for matrices, Adam for the rest."""
    matrices = optax.contrib.scale_by_muon(beta=beta, weight_dimension_numbers=lambda params: (
        jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(), params)))
    return optax.partition(
        {"muon": matrices, "adam": scale_by_adam(beta, b2)},
        lambda params: jax.tree.map(lambda leaf: "muon" if leaf.ndim == 2 else "adam", params),
    )


# --- what is refused ------------------------------------------------------------------------------
def no_optimizer():
    return 0.1


def branching(momentum):
    return optax.trace(momentum) if momentum > 0 else optax.identity()


def broken():
    def update(gradient, state, params=None):
        return jax.tree.map(lambda leaf: leaf @ jnp.ones(3), gradient), state

    return optax.GradientTransformation(lambda params: (), update)


def state_of(before, after):
    """An optimizer whose state is `before`, and `after` an update."""
    return optax.GradientTransformation(
        lambda params: before(), lambda gradient, state, params=None: (gradient, after()))


def narrowing():
    return state_of(lambda: {"seen": jnp.zeros(2, jnp.float32)},
                    lambda: {"seen": jnp.zeros(2, jnp.float16)})


def growing():
    return state_of(lambda: {"seen": jnp.zeros(2)}, lambda: {"seen": jnp.zeros(3)})


def forgetting():
    return state_of(lambda: {"seen": jnp.zeros(2)}, dict)


def with_key():
    return state_of(lambda: jax.random.key(0), lambda: jax.random.key(0))


def summing():
    return optax.stateless(lambda gradient, params: jax.tree.map(jnp.sum, gradient))
