"""The config of a run: its keys, their values, how texts set them, and what they mean."""

from bigbatch.config.checks import check
from bigbatch.config.keys import base_config
from bigbatch.config.meaning import (
    epochs_of,
    evaluations,
    exchange,
    make_due,
    make_layouts,
    make_limits,
    make_phases,
    make_recipe,
    make_strategy,
    noise_layout,
    noise_window,
    saved_config,
    tokens_per_example,
)
from bigbatch.config.texts import from_argument, refusal, set_from_text

__all__ = [
    "base_config", "check", "epochs_of", "evaluations", "exchange", "from_argument", "make_due",
    "make_layouts", "make_limits", "make_phases", "make_recipe", "make_strategy", "noise_layout",
    "noise_window", "refusal", "saved_config", "set_from_text", "tokens_per_example",
]
