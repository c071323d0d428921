"""The optimizer of an update: Optax's transformations, with rate and momentum as inputs."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

Tree = Any


def make_optimizer(
    config: ConfigDict, in_norm: Tree, learning_rate: jax.Array, momentum: jax.Array
) -> optax.GradientTransformation:
    """The optimizer at a rate and momentum, which are inputs of the update, not constants.

    The rate multiplies after the accumulator, A <- m A + g, w <- w - eps A (paper, equations 6 and
    7), so a change of rate needs no correction. The state does not depend on either.
    """
    options = config.optimizer
    decay_mask = {
        "all": lambda params: jax.tree.map(lambda _: True, params),
        "no_norms": lambda params: jax.tree.map(lambda norm: not norm, in_norm),
        "no_norms_or_biases": lambda params: jax.tree_util.tree_map_with_path(
            lambda path, norm: not norm and getattr(path[-1], "key", None) != "bias", in_norm
        ),
    }[options.weight_decay_on]
    decay = optax.add_decayed_weights(options.weight_decay, decay_mask)
    accumulator = {
        "momentum": lambda: optax.trace(momentum),
        "nesterov": lambda: optax.trace(momentum, nesterov=True),
        "sgd": optax.identity,
        "adam": lambda: optax.scale_by_adam(momentum, options.beta2, options.epsilon),
    }[options.name]()
    steps = [accumulator, decay] if options.decoupled else [decay, accumulator]
    return optax.chain(*steps, optax.scale(-learning_rate))


def init_optimizer(config: ConfigDict, in_norm: Tree, params: Tree) -> Tree:
    """The optimizer's state before the first update; its tree is also the checkpoint's."""
    return make_optimizer(config, in_norm, jnp.zeros(()), jnp.zeros(())).init(params)
