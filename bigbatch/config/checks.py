"""Which values the keys of a config may have."""

import functools
import math
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from bigbatch import dotted, schedule
from bigbatch.config.keys import (
    BY_OPTIMIZER,
    CROP_STYLES,
    DTYPES,
    LENGTHS,
    MEASURED_BY,
    ON_BAD_IMAGE,
    OPTIMIZERS,
    RESAMPLE,
    WEIGHT_DECAY_ON,
    items,
    other_name,
)
from bigbatch.config.meaning import epochs_of, make_recipe
from bigbatch.mistake import Mistake

TINY = math.ulp(0.0)  # the smallest number over 0
# Allowed values by key: (the text of the error, the least value, and the bound that is excluded).
RANGES = {
    **{key: ("be 1 or more and below 2**31", 1, 2**31) for key in (
        "data.train_examples", "data.test_examples", "recipe.batch_size")},
    **{key: (f"be {least} or more", least, math.inf) for key, least in (
        ("ghost_size", 1), ("max_per_device_batch", 1), ("microbatches", 0),
        ("eval_batch_size", 1), ("keep_checkpoints", 1), ("data.num_classes", 1),
        ("data.image_size", 1), ("sharding.shards", 0), ("sharding.smallest", 1),
        ("data.augment.pad", 0), ("data.augment.crop", 0), ("data.workers", 0),
        ("data.read_threads", 1), ("noise.ghosts", 2))},
    **{key: ("be a finite number over 0", TINY, math.inf) for key in (
        "log_every_epochs", "eval_every_epochs", "checkpoint_every_epochs", "measured.every_epochs",
        "optimizer.epsilon")},
    **{key: ("be a finite number, 0 or more", 0, math.inf) for key in (
        "measured.stay_epochs", "intervals_from")},
    "seed": ("be 0 or more and below 2**32", 0, 2**32),
    "data.eval_share": ("lie in (0, 1]", TINY, math.nextafter(1.0, 2.0)),
    **{key: ("be a finite number, 0 or more", 0, math.inf) for key in (
        "optimizer.weight_decay", "optimizer.clip_norm", "noise.every_epochs",
        "noise.window_epochs")},
    "label_smoothing": ("lie in [0, 1)", 0, 1),
    "optimizer.beta2": ("lie in [0, 1)", 0, 1),
    "per_example.momentum_floor": ("lie in [0, 1)", 0, 1),
    "per_example.beta2_floor": ("lie in [0, 1)", 0, 1),
    "ema": ("lie in [0, 1); 0 keeps no average of the weights", 0, 1),
}
# Of tuples, what each of their numbers must be, likewise. Images are normalised in float32.
LARGEST, SMALLEST = (2 - 2**-23) * 2.0**127, 2.0**-126
ELEMENT_RANGES = {
    "data.mean": ("be finite numbers", -LARGEST, LARGEST),
    "data.std": ("be finite numbers over 0", SMALLEST, LARGEST),
}


def check(config: ConfigDict) -> None:
    """Checks the values of a config.

    Raises:
        Mistake: if a value is not allowed; the text has the key, its value and what is allowed.
    """
    for key, allowed in (
        ("dtype", DTYPES),
        ("strategy", schedule.STRATEGIES),
        ("measured.by", MEASURED_BY),
        ("exchange", (BY_OPTIMIZER, *schedule.EXCHANGES)),
        ("optimizer.weight_decay_on", WEIGHT_DECAY_ON),
        ("data.crop_style", CROP_STYLES),
        ("data.resample", RESAMPLE),
        ("data.on_bad_image", ON_BAD_IMAGE),
    ):
        value = _value(config, key)
        if value not in allowed:
            raise Mistake(
                f"config.{key} is {value!r}; allowed are {', '.join(allowed)}.{other_name(value)}")
    _check_plain(config)
    _check_optimizer(config)
    for key, (allowed, least, most) in ELEMENT_RANGES.items():
        numbers = _value(config, key)
        if not all(_is_number(number) and least <= number <= most for number in numbers):
            raise Mistake(f"config.{key} is {tuple(numbers)}; its values must {allowed}.")
    # Lengths last, since a length in another unit is computed from other keys.
    for key, (allowed, least, below) in sorted(RANGES.items(), key=lambda row: row[0] in LENGTHS):
        value = epochs_of(config, key) if key in LENGTHS else _value(config, key)
        examples = value * config.data.train_examples if key in LENGTHS else 0
        if not (least <= value < below and math.isfinite(examples)):
            raise Mistake(f"config.{key} is {_value(config, key)}; it must {allowed}.")
    if config.optimizer.name == "adam" and config.scale_up.momentum is not None:
        raise Mistake(
            f"config.scale_up.momentum is {config.scale_up.momentum:g}, but Adam averages the "
            "gradients with its first beta, so a larger one does not lengthen the steps and the "
            "batch cannot grow with it; set it to None, or use optimizer.name=momentum."
        )
    if epochs_of(config, "noise.every_epochs") and config.noise.by_groups is False:
        raise Mistake(
            f"config.noise.every_epochs is {_value(config, 'noise.every_epochs')}, but "
            "config.noise.by_groups is False, and single ghost batches are measured as groups; set "
            "noise.by_groups=None, or noise.every_epochs=0.")
    by_all = config.measured.by == "all"
    if config.strategy == "measured" and by_all and not epochs_of(config, "noise.every_epochs"):
        raise Mistake(
            "config.measured.by is 'all', but config.noise.every_epochs is 0, so the noise is "
            "never measured by all parameters; set it to how often, or measured.by to 'norms'.")
    if config.strategy == "measured" and config.measured.rule == "cabs" and not by_all:
        raise Mistake(
            "config.measured.rule is 'cabs', which reads the noise itself and no quotient: set "
            "measured.by to 'all', and noise.every_epochs to how often it is measured.")
    momentum = make_recipe(config).momentum
    if config.optimizer.name == "sgd" and momentum:
        raise Mistake(
            f"the momentum is {momentum:g}, but config.optimizer.name is 'sgd', which has none: "
            "set recipe.momentum=0 or optimizer.name=momentum."
        )


def _check_optimizer(config: ConfigDict) -> None:
    """Checks the name, and that the other keys are of use with it; the path is not followed yet."""
    options = config.optimizer
    own = isinstance(options.name, str) and dotted.is_dotted(options.name)
    if options.name not in OPTIMIZERS and not own:
        raise Mistake(
            f"config.optimizer.name is {options.name!r}; allowed are {', '.join(OPTIMIZERS)}, or a "
            "dotted path such as 'optax.scale_by_lion' (docs/optimizers.md)."
            f"{other_name(options.name)}"
        )
    if options.options and not own:
        raise Mistake(
            f"config.optimizer.options is {options.options.to_dict()}, but config.optimizer.name "
            f"is {options.name!r}; only an optimizer named by a dotted path has options."
        )
    if options.weight_decay_on != "all" and "weight_decay" in options.options.values():
        raise Mistake(
            f"config.optimizer.weight_decay_on is {options.weight_decay_on!r}, but "
            f"{options.name} is given the weight decay and spares what it likes: set "
            "weight_decay_on to 'all', or take weight_decay out of optimizer.options, and it is "
            "added outside of it."
        )


def _check_plain(config: ConfigDict) -> None:
    """Checks that each value is one that a run's files can hold, and give back as it was."""
    for key, whole in items(config):
        for value in _leaves(whole):
            if value is None or isinstance(value, bool | int | float | str | type):
                continue
            change = ("call its .tolist()" if hasattr(value, "tolist") else
                      "name it by its dotted path" if callable(value) else "change its type")
            raise Mistake(
                f"config.{key} has a value of the type {type(value).__name__}; allowed are numbers,"
                f" texts, True, False, None, and tuples, lists and dicts of them: {change}."
            )


def _leaves(value: Any) -> list[Any]:
    """A value, or the values inside of a tuple, list or dict."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if not isinstance(value, tuple | list):
        return [value]
    return [leaf for inner in value for leaf in _leaves(inner)]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _value(config: ConfigDict, key: str) -> Any:
    """The value of a dotted key."""
    return functools.reduce(ConfigDict.__getitem__, key.split("."), config)
