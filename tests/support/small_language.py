"""A language model for tests, ready to train a few seconds after its start.

    python -m bigbatch.main --config=tests/support/small_language.py:small --workdir=DIR

Some tokens weigh nothing, and dropout is on. Updates of 3 ghost batches, then of 12, so that on 2
or 8 devices shares are uneven.
"""

import numpy as np
from ml_collections import ConfigDict

from bigbatch.config import from_argument
from tests.support.configs import load

SEPARATOR, PADDING = 1, 2
PRESETS = {"small": {}}


def get_config(argument: str = "") -> ConfigDict:
    """The config of `small,key=value,...`: 6 updates of 12 sequences, then 3 of 48."""
    config = load("language", "bytes")
    config.model.update({"blocks": 1, "width": 8, "heads": 2, "hidden": 12, "dropout_rate": 0.1})
    config.recipe.update({
        "batch_size": 12, "epochs": "1728 tokens", "curve": "steps", "warmup_epochs": 0.0,
        "falls": (("576 tokens", 4.0),), "learning_rate": 0.02,
    })
    config.limits.max_batch_size = 48
    config.ghost_size = 4
    config.data.update({
        "name": "tests.support.small_language.rows", "train_split": "train", "test_split": "test",
        "train_examples": 80, "test_examples": 20, "num_classes": 32,
    })
    config.data.options.update({"length": 8, "separator": SEPARATOR, "padding": PADDING})
    config.eval_batch_size = 8
    for what, every in (("log", 192), ("eval", 384), ("checkpoint", 384)):
        config[f"{what}_every_epochs"] = f"{every} tokens"
    return from_argument(config, argument, PRESETS)


def rows(data: ConfigDict) -> tuple[np.ndarray, np.ndarray]:
    """Sequences of documents, padded from a place of their own on: what a config names as data."""
    generator = np.random.default_rng(0)
    found = []
    for examples in (data.train_examples, data.test_examples):
        length = data.options.length + 1
        tokens = generator.integers(3, data.num_classes, (examples, length))
        tokens[generator.random(tokens.shape) < 0.2] = SEPARATOR
        lengths = generator.integers(2, length + 1, (examples, 1))
        found.append(np.where(np.arange(length) < lengths, tokens, PADDING))
    return tuple(found)
