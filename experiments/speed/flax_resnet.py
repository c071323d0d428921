"""ResNet-50 and its train step as Flax's ImageNet example writes them, to be timed against.

flax.linen with its BatchNorm, optax.sgd with Nesterov momentum, the L2 penalty in the loss, one
jitted step on one device. The network is `bigbatch.models.resnet`'s, parameter for parameter: where
the example pads a stride's odd pixel on one side, this pads both alike, so that losses agree.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen


class Bottleneck(linen.Module):
    """relu(shortcut + 1x1, 3x3, 1x1 convolutions with BatchNorm)."""

    width: int
    stride: int
    dtype: Any

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv = partial(linen.Conv, use_bias=False, dtype=self.dtype)
        norm = partial(linen.BatchNorm, use_running_average=False, momentum=0.9, epsilon=1e-5,
                       dtype=self.dtype)
        y = linen.relu(norm(name="norm_0")(conv(self.width, (1, 1), name="conv_0")(x)))
        y = conv(self.width, (3, 3), self.stride, padding=1, name="conv_1")(y)
        y = linen.relu(norm(name="norm_1")(y))
        y = conv(4 * self.width, (1, 1), name="conv_2")(y)
        y = norm(name="norm_2", scale_init=linen.initializers.zeros)(y)
        if x.shape != y.shape:
            x = conv(4 * self.width, (1, 1), self.stride, name="project")(x)
            x = norm(name="project_norm")(x)
        return linen.relu(x + y)


class ResNet(linen.Module):
    """Version 1.5, of bottlenecks."""

    num_classes: int
    dtype: Any
    blocks: Sequence[int] = (3, 4, 6, 3)
    width: int = 64

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = linen.Conv(self.width, (7, 7), 2, padding=3, use_bias=False, dtype=self.dtype,
                       name="conv")(x)
        x = linen.BatchNorm(False, momentum=0.9, epsilon=1e-5, dtype=self.dtype, name="norm")(x)
        x = linen.max_pool(linen.relu(x), (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        number = 0
        for group, count in enumerate(self.blocks):
            for place in range(count):
                x = Bottleneck(self.width * 2**group, 2 if group and not place else 1, self.dtype,
                               name=f"block_{number}")(x)
                number += 1
        x = jnp.mean(x, axis=(1, 2))
        return linen.Dense(self.num_classes, dtype=self.dtype, name="head")(x).astype(jnp.float32)


class TrainState(NamedTuple):
    """Everything that a step changes."""

    params: Any
    batch_stats: Any
    opt_state: Any


def make_step(
    network: ResNet, rate: float, momentum: float, weight_decay: float, axis: str = ""
) -> tuple[Callable, Callable]:
    """`init(params) -> state` and the jitted `step(state, images, labels) -> state, loss`.

    The loss is the cross entropy alone. Where `axis` names devices, the step is one device's part:
    statistics are its own, as the example's are until it evaluates, and gradients and metrics are
    averaged over the devices.
    """
    mean = partial(jax.lax.pmean, axis_name=axis) if axis else lambda tree: tree
    optimizer = optax.sgd(rate, momentum, nesterov=True)

    def init(params: Any, batch_stats: Any) -> TrainState:
        return TrainState(params, batch_stats, optimizer.init(params))

    @partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, images: jax.Array, labels: jax.Array) -> tuple[TrainState, Any]:
        def objective(params: Any) -> tuple[jax.Array, Any]:
            logits, new = network.apply(
                {"params": params, "batch_stats": state.batch_stats}, images,
                mutable=["batch_stats"])
            targets = jax.nn.one_hot(labels, network.num_classes)
            loss = optax.softmax_cross_entropy(logits, targets).mean()
            penalty = sum(jnp.sum(w**2) for w in jax.tree.leaves(params) if w.ndim > 1)
            return loss + weight_decay * 0.5 * penalty, (loss, logits, new["batch_stats"])

        gradient, (loss, logits, stats) = jax.grad(objective, has_aux=True)(state.params)
        gradient = mean(gradient)
        steps, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        accuracy = jnp.mean(jnp.argmax(logits, -1) == labels)
        params = optax.apply_updates(state.params, steps)
        return TrainState(params, stats, opt_state), mean((loss, accuracy))

    return init, step


def from_ours(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters or statistics of `bigbatch.models.resnet.ResNet` under this network's names."""
    renamed = {name: tree[name] for name in ("conv", "norm", "head") if name in tree}
    for number, block in tree["blocks"].items():
        renamed[f"block_{number}"] = {
            name: block[name] for name in ("project", "project_norm") if name in block
        } | {
            f"{kind}_{place}": layer
            for kind in ("conv", "norm") for place, layer in block.get(f"{kind}s", {}).items()
        }
    return renamed
