"""Small configs for the tests: the digits with a tiny Wide ResNet, through phase changes."""

from pathlib import Path

from ml_collections import ConfigDict

from bigbatch import config_files

CONFIGS = Path(__file__).parents[2] / "configs"


def load(name: str, argument: str = "") -> ConfigDict:
    """`get_config(argument)` of configs/`name`.py."""
    return config_files.load_file(CONFIGS / f"{name}.py").get_config(argument)


TINY = (
    "increase", "recipe.epochs=2", "recipe.falls=((0.7,2),(1.4,2))", "recipe.batch_size=48",
    "limits.max_batch_size=192", "recipe.learning_rate=0.1", "log_every_epochs=0.1",
    "eval_every_epochs=0.5", "checkpoint_every_epochs=0.25", "tensorboard=false",
)


def tiny(*settings: str) -> ConfigDict:
    """Two epochs of the digits in three phases (batches 48, 96, 192), with `key=value` settings."""
    return load("digits", ",".join([*TINY, *settings]))
