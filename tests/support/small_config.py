"""A config for jobs of many processes, which are ready to train a few seconds after their start.

    python -m bigbatch.main --config=tests/support/small_config.py:resident --workdir=DIR

Batches of 6 and 12 ghost batches, so that with 8 devices some slots stay empty.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from bigbatch.config import from_argument
from bigbatch.models.dropout import dropout
from bigbatch.models.normalization import GhostBatchNorm
from tests.support.updates import with_model

PRESETS = {
    "resident": {"data.name": "tests.support.small_config.pictures"},
    # Made by test_hosts.photographs; data.dir is needed.
    "streaming": {
        "data.name": "photographs", "data.streaming": True, "data.test_split": "test[:44]",
        "data.mean": (120.0,) * 3, "data.std": (60.0,) * 3, "model.pixels": 192,
    },
}


def get_config(argument: str = "") -> ConfigDict:
    """The config of `preset,key=value,...`: 7 updates of 48 examples, then 2 of 96."""
    config = with_model(
        "support.small_config.Perceptron", {"ghost_size": 8, "pixels": 64}, "ghost_size=8",
        "recipe.epochs=3", "recipe.falls=((2,2),)", "limits.max_batch_size=96",
        "data.train_examples=160", "data.test_examples=44", "log_every_epochs=0.5",
        "eval_every_epochs=1", "checkpoint_every_epochs=1",
    )
    config.data.augment.update({"pad": 0, "crop": 0, "flip": True})
    return from_argument(config, argument, PRESETS)


def pictures(data: ConfigDict) -> tuple[np.ndarray, ...]:
    """Noise, brighter for a higher label: what a config names as its data."""
    generator = np.random.default_rng(0)
    arrays = []
    for examples in (data.train_examples, data.test_examples):
        labels = generator.integers(0, data.num_classes, examples)
        noise = generator.integers(0, 100, (examples, data.image_size, data.image_size, 1))
        arrays += [(noise + 15 * labels[:, None, None, None]).astype(np.uint8), labels]
    return tuple(arrays)


class Perceptron(nnx.Module):
    """One hidden layer, with ghost batch normalisation and dropout."""

    def __init__(
        self, num_classes: int, dtype: jnp.dtype, rngs: nnx.Rngs, *, ghost_size: int, pixels: int
    ):
        types = {"dtype": dtype, "param_dtype": jnp.promote_types(dtype, jnp.float32)}
        self.hidden = nnx.Linear(pixels, 16, use_bias=False, **types, rngs=rngs)
        self.norm = GhostBatchNorm(16, ghost_size=ghost_size, dtype=dtype, rngs=rngs)
        self.head = nnx.Linear(16, num_classes, **types, rngs=rngs)

    def __call__(self, images: jax.Array, train: bool, keys: jax.Array) -> jax.Array:
        x = nnx.relu(self.norm(self.hidden(images.reshape(len(images), -1)), train))
        return self.head(dropout(x, 0.1, keys, train, tag=0))
