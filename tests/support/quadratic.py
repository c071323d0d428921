"""A noisy quadratic, as a package of a user's own would hold it: its moments are known exactly.

The loss of an example x, drawn from a normal distribution, is |w - x|^2/2 - |x|^2/2, so the
gradient is w - x: curvature 1, and noise of variance 1 in each coordinate. The loss over the test
set, of zeros, is |w|^2/2.
"""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from bigbatch.config import base_config
from bigbatch.tasks import Field, InMemory

COORDINATES = 64


class Quadratic:
    """The task."""

    def fields(config):
        return {"points": Field((COORDINATES,), np.float32)}

    def prepare(config, fields_B, keys_B, train):
        return fields_B["points"], fields_B["points"]

    def losses(config, outputs_BxC, points_BxC):
        values = (outputs_BxC * (outputs_BxC / 2 - points_BxC)).sum(axis=1)
        return {"loss": (values, jnp.ones(len(values), values.dtype))}

    def load(config):
        draw = np.random.default_rng(config.task_options.draw)
        points = draw.normal(size=(config.data.train_examples, COORDINATES)).astype(np.float32)
        zeros = np.zeros((config.data.test_examples, COORDINATES), np.float32)
        return InMemory({"points": points}, {"points": zeros})


class Point(nnx.Module):
    """The network: the same output for every example."""

    def __init__(self, num_classes, dtype, rngs):
        self.w = nnx.Param(jnp.zeros((8, COORDINATES // 8), dtype))  # devices can share it

    def __call__(self, points, train, keys):
        return jnp.broadcast_to(self.w[...].ravel(), points.shape)


def get_config(argument=""):
    """SGD at a constant rate, in batches of 8; `argument` is the number of the draw."""
    config = base_config()
    config.update({"network": "tests.support.quadratic.Point", "ghost_size": 1,
                   "task": "tests.support.quadratic.Quadratic", "tensorboard": False,
                   "strategy": "decay", "eval_batch_size": 8, "checkpoint_every_epochs": 1 / 16,
                   "eval_every_epochs": 1.0, "log_every_epochs": 1.0, "keep_checkpoints": 99})
    config.seed = int(argument or 0)
    config.task_options.draw = config.seed
    config.optimizer.name = "sgd"
    config.recipe.update({"batch_size": 8, "learning_rate": 0.05, "momentum": 0.0, "epochs": 1.0})
    config.data.update({"train_examples": 16384, "test_examples": 8})
    return config


def mean_loss(factor, rate=0.05, batch=8, examples=None, start=0.0):
    """The expected test loss of SGD in `factor` times the batch at `factor` times the rate.

    Args:
        factor: of the batch and the rate.
        rate: of the factor 1.
        batch: of the factor 1.
        examples: after which it is; None for the limit.
        start: the square of each coordinate of w at the beginning.
    """
    shrinks = (1 - factor * rate) ** 2
    limit = rate**2 * factor / batch / (1 - shrinks) if shrinks < 1 else np.inf
    left = 0.0 if examples is None else shrinks ** (examples / (factor * batch))
    return COORDINATES * (limit + left * (start - limit)) / 2
