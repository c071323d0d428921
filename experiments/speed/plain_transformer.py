"""The train step of a language model as Flax's and Optax's users write it, to be timed against.

The network is `bigbatch.models.transformer`'s, called as any nnx module; the loss is the mean cross
entropy of Optax, the optimizer `optax.adamw` at a constant rate. Nothing of this package's update
is in it: no ghost batches, no weights of tokens, no sums, no rates as inputs, no check for numbers
that are not finite.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import optax
from flax import nnx


class TrainState(NamedTuple):
    """Everything that a step changes."""

    params: Any
    opt_state: Any


def make_step(
    module: nnx.Module, rate: float, beta1: float, beta2: float, weight_decay: float,
    axis: str = "",
) -> tuple[Callable, Callable]:
    """`init(params) -> state` and the jitted `step(state, tokens) -> state, loss`.

    Args:
        module: the network, or its shapes (`nnx.eval_shape`).
        rate: the learning rate.
        beta1: of AdamW.
        beta2: of AdamW.
        weight_decay: of AdamW, of kernels and tables only.
        axis: names the devices; the step is then one device's part, and gradients are averaged.
    """
    graph, variables = nnx.split(module)
    mean = partial(jax.lax.pmean, axis_name=axis) if axis else lambda tree: tree
    optimizer = optax.adamw(
        rate, beta1, beta2, weight_decay=weight_decay,
        mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params))

    def init(params: Any) -> TrainState:
        return TrainState(params, optimizer.init(params))

    @partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, tokens_BxT1: jax.Array) -> tuple[TrainState, jax.Array]:
        def objective(params: Any) -> jax.Array:
            filled = jax.tree.map(lambda leaf: leaf, variables)
            nnx.replace_by_pure_dict(filled, params)
            logits_BxTxV = nnx.merge(graph, filled, copy=True)(tokens_BxT1[:, :-1], True, None)
            return optax.softmax_cross_entropy_with_integer_labels(
                logits_BxTxV, tokens_BxT1[:, 1:]).mean()

        loss, gradient = jax.value_and_grad(objective)(state.params)
        gradient, loss = mean((gradient, loss))
        steps, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        return TrainState(optax.apply_updates(state.params, steps), opt_state), loss

    return init, step
