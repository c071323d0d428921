"""The optimizer of an update: Optax transformations, with rate and momentum as inputs."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

Tree = Any


def make_optimizer(
    config: ConfigDict, in_norm: Tree, learning_rate: jax.Array, momentum: jax.Array
) -> optax.GradientTransformation:
    """Makes the optimizer for a learning rate and a momentum, which may change at every update.

    The rate multiplies the accumulator, not what is added to it: A <- m A + g, w <- w - eps A
    (Smith et al., ICLR 2018, equations 6 and 7). So a change of the rate needs no correction of the
    accumulator. The optimizer's state depends neither on the rate nor on the momentum.

    Args:
        config: `config.optimizer` is read.
        in_norm: see `network.Network`.
        learning_rate: eps, a scalar; an input of the update and not a constant, so that a new
            value needs no compilation.
        momentum: m, likewise; for Adam its first beta.
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
    """The optimizer's state before the first update. Checkpoints have the same tree structure."""
    return make_optimizer(config, in_norm, jnp.zeros(()), jnp.zeros(())).init(params)
