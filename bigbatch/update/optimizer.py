"""The optimizer of an update: Optax transformations, with the rates as inputs."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from bigbatch.schedule.rates import Rates
from bigbatch.update import own_optimizer
from bigbatch.update.adam import scale_by_adam

Tree = Any


def make_optimizer(
    config: ConfigDict, in_norm: Tree, rates: Rates,
    norm: Callable[[Tree], jax.Array] = optax.tree.norm,
) -> optax.GradientTransformation:
    """Makes the optimizer for rates that may change at every update.

    The rate multiplies the accumulator, not what is added to it: A <- m A + g, w <- w - eps A
    (Smith et al., ICLR 2018, equations 6 and 7). So a change of the rate needs no correction of the
    accumulator. How the state begins depends on none of the rates.

    The gradient's global norm is clipped first, if `clip_norm` is not 0. Here the gradient is the
    mean over the whole batch, so what is clipped does not depend on devices and passes.

    Args:
        config: `config.optimizer` is read.
        in_norm: see `network.Network`.
        rates: scalar arrays; inputs of the update and not constants, so that new values need no
            compilation. `rates.weight_decay` is read where the decay is decoupled; L2 decay, which
            is added to the gradient, is `config.optimizer.weight_decay`.
        norm: the global norm of a gradient, of which a device may have pieces only.

    Raises:
        Mistake: see `own_optimizer.make`.
    """
    options = config.optimizer
    decay_mask = {
        "all": lambda params: jax.tree.map(lambda _: True, params),
        "no_norms": lambda params: jax.tree.map(lambda norm: not norm, in_norm),
        "no_norms_or_biases": lambda params: jax.tree_util.tree_map_with_path(
            lambda path, norm: not norm and getattr(path[-1], "key", None) != "bias", in_norm
        ),
    }[options.weight_decay_on]
    decay = optax.add_decayed_weights(
        rates.weight_decay if options.decoupled else options.weight_decay, decay_mask)
    accumulator = own_optimizer.make(config, rates) if own_optimizer.is_own(config) else {
        "momentum": lambda: optax.trace(rates.momentum),
        "nesterov": lambda: _nesterov(rates),
        "sgd": optax.identity,
        "adam": lambda: scale_by_adam(rates.momentum, rates.beta2, options.epsilon),
    }[options.name]()
    steps = [accumulator, decay] if options.decoupled else [decay, accumulator]
    if own_optimizer.is_own(config) and own_optimizer.decays_itself(config):
        steps = [accumulator]
    clip = [_clip(options.clip_norm, norm)] if options.clip_norm else []
    return optax.chain(*clip, *steps, optax.scale(-rates.learning_rate))


def init_optimizer(config: ConfigDict, in_norm: Tree, params: Tree) -> Tree:
    """The optimizer's state before the first update. Checkpoints have the same tree structure."""
    nothing = Rates(*[jnp.zeros(())] * len(Rates._fields))
    return make_optimizer(config, in_norm, nothing).init(params)


def _nesterov(rates: Rates) -> optax.GradientTransformation:
    """A <- m A + g with the step m' A + g: m' is not m where m also carries A over."""
    accumulator = optax.trace(rates.momentum)

    def update(gradient: Tree, state: Tree, params: Tree = None) -> tuple[Tree, Tree]:
        accumulated, state = accumulator.update(gradient, state)
        return jax.tree.map(
            lambda added, of: rates.look_ahead * added + of, accumulated, gradient), state

    return optax.GradientTransformation(accumulator.init, update)


def _clip(most: float, norm: Callable[[Tree], jax.Array]) -> optax.GradientTransformation:
    """Scales a gradient whose norm is `most` or more to this norm (Pascanu et al., ICML 2013)."""
    def update(gradient: Tree, state: Tree, params: Tree = None) -> tuple[Tree, Tree]:
        found = norm(gradient)
        small = found < most
        return jax.tree.map(
            lambda leaf: jax.lax.select(small, leaf, leaf / found * most), gradient), state

    return optax.GradientTransformation(optax.init_empty_state, update)
