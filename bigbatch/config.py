"""The keys of a config with their defaults, how they are set, and what is made of them.

A config file defines `get_config(argument)`, which starts from `base_config()`. The argument is the
text after the colon in `--config=file.py:preset,key=value`.
"""

import ast
import difflib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict, config_dict

from bigbatch import dotted, schedule
from bigbatch.mistake import Mistake
from bigbatch.schedule import due
from bigbatch.schedule.layout import Layout, make_layout

DTYPES = ("float32", "bfloat16", "float64")
# The exchange of each optimizer, where config.exchange does not say: see schedule.rates.
OPTIMIZERS = {"momentum": "linear", "nesterov": "linear", "sgd": "linear", "adam": "sqrt"}
BY_OPTIMIZER = "by_optimizer"
WEIGHT_DECAY_ON = ("all", "no_norms", "no_norms_or_biases")
CROP_STYLES = ("goyal", "inception", "none")
RESAMPLE = ("bicubic", "bilinear")
ON_BAD_IMAGE = ("stop", "skip")
# What version 0.1 had in configs/small.py: {its dotted path: the one of now}.
MOVED = {
    "configs.small.half_resolution": "bigbatch.data.smaller.half_resolution",
    "configs.small.some_digits": "bigbatch.data.smaller.some_digits",
}
TINY = math.ulp(0.0)  # the smallest number over 0
# Allowed values by key: (the text of the error, the least value, and the bound that is excluded).
RANGES = {
    **{key: (f"be {least} or more", least, math.inf) for key, least in (
        ("ghost_size", 1), ("max_per_device_batch", 1), ("microbatches", 0),
        ("eval_batch_size", 1), ("keep_checkpoints", 1), ("data.num_classes", 2),
        ("data.train_examples", 1), ("data.test_examples", 1), ("data.image_size", 1),
        ("data.augment.pad", 0), ("data.augment.crop", 0), ("data.workers", 0),
        ("data.read_threads", 1))},
    **{key: ("be a finite number over 0", TINY, math.inf) for key in (
        "log_every_epochs", "eval_every_epochs", "checkpoint_every_epochs", "optimizer.epsilon")},
    "seed": ("be 0 or more and below 2**32", 0, 2**32),
    "data.eval_share": ("lie in (0, 1]", TINY, math.nextafter(1.0, 2.0)),
    **{key: ("be a finite number, 0 or more", 0, math.inf) for key in (
        "optimizer.weight_decay", "optimizer.clip_norm")},
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
FREE = (["data", "options"], ["optimizer", "options"])  # the groups whose keys need not be known
MAY_BE_NONE = ("scale_up.momentum", "limits.max_batch_size", "limits.granularity", "limits.growth",
               "per_example.momentum")


def base_config() -> ConfigDict:
    """A locked config with every key and its default, from which each config file starts."""
    config = ConfigDict()
    config.seed = 0  # for initialisation, data order, augmentation and dropout
    config.dtype = "float32"  # in which the network computes: float32, bfloat16, float64
    config.ghost_size = 128  # examples over which a batch statistic is taken

    _add_schedule(config)
    config.optimizer = ConfigDict({
        # momentum, nesterov, sgd, adam, or the dotted path of a function that returns an Optax
        # transformation: see docs/optimizers.md.
        "name": "momentum",
        "options": {},  # the function's arguments; "momentum", "beta2", "weight_decay" are inputs
        "weight_decay": 0.0,
        "weight_decay_on": "all",  # all, no_norms, no_norms_or_biases
        "decoupled": False,  # True: weights shrink by rate x decay; False: added to the gradient
        "beta2": 0.999,  # Adam's; its beta1 is the recipe's momentum
        "epsilon": 1e-8,  # Adam's
        # The largest global norm of an update's mean gradient, before any decay; 0: not clipped.
        "clip_norm": 0.0,
    })
    config.label_smoothing = 0.0
    # What an update leaves of a running average of the weights and statistics, such as 0.999, which
    # is evaluated beside the weights; 0: none is kept.
    config.ema = 0.0

    config.network = "bigbatch.models.wide_resnet.WideResNet"  # dotted path of a model function
    config.model = ConfigDict()  # its keyword arguments
    # Weights to begin with, in the place of those that the seed draws: a workdir, or an .npz file
    # of bigbatch-export; and the layers that begin anew all the same, such as ("head",).
    config.init_from = ""
    config.init_anew = ()

    config.data = ConfigDict({
        "name": "digits",  # digits, folder, a TFDS name, or the dotted path of a function of arrays
        # TFDS data_dir (empty: TFDS's own default), or what holds a folder's splits.
        "dir": "",
        "train_split": "train",
        "test_split": "test",
        "train_examples": 1437,  # N; checked when the data are loaded
        "test_examples": 360,
        "num_classes": 10,
        "image_size": 8,  # side of the network's input images in pixels
        "mean": (0.0,),  # per channel, on the scale 0 to 255
        "std": (255.0,),
        "streaming": False,  # False: the data set is kept in device memory as uint8
        "options": {},  # keys of your own, for the function that `name` names
        # Pixels of reflection padding; side of the random crop (0: none); random left-right flips.
        "augment": {"pad": 0, "crop": 0, "flip": False},
        # The keys below are read only if streaming is True.
        "crop_style": "goyal",  # goyal, inception, none: see bigbatch/data/decode.py
        "eval_share": 0.875,  # of the side of an image that evaluation crops around the centre
        "resample": "bicubic",  # bicubic, bilinear
        # stop, or skip: a skipped image is counted and has weight 0 in the loss, but enters the
        # statistics of its ghost batch as black.
        "on_bad_image": "stop",
        "workers": 0,  # processes that decode images; 0: threads of the training process decode
        "read_threads": 2,  # in each of these processes, or in the training process
    })

    # The keys below do not change what is learned.
    config.max_per_device_batch = 1024  # examples a device takes in one pass at most
    config.microbatches = 0  # passes of an update; 0: those that take least time
    config.eval_batch_size = 500  # examples on each device
    config.log_every_epochs = 0.1
    config.eval_every_epochs = 1.0
    config.checkpoint_every_epochs = 10.0
    config.keep_checkpoints = 2  # the newest ones; those at phase boundaries are kept too
    config.tensorboard = True
    config.lock()  # so that a misspelt key in a config file is an error and not a new key
    _unlock_free_groups(config)
    return config


def _add_schedule(config: ConfigDict) -> None:
    """Adds the keys that decide the batches and the rates; see `bigbatch.schedule`."""
    # How the noise falls: by the rate (decay), by the batch (increase), first by the batch and then
    # by the rate (hybrid), with batches given by hand (by_hand), or not at all (constant).
    # See schedule.plan_phases.
    config.strategy = "increase"
    config.hybrid_falls = 1  # for hybrid: how many falls, or growths of the batch, are the batch's
    config.by_hand = ()  # for by_hand: ((epoch, batch), ...), each batch from its epoch on
    # ((epoch, factor), ...), with any strategy: the run begins with a batch that is smaller by all
    # factors, and multiplies it by each at its epoch. The noise does not change.
    config.ramp = ()
    # The rate is multiplied by (batch / recipe.batch_size) to the power of 1 (linear: SGD's rule),
    # 1/2 (sqrt: Adam's) or 0 (none). by_optimizer: linear for momentum, nesterov and sgd, sqrt for
    # adam.
    config.exchange = BY_OPTIMIZER
    # The reference: what the run would do with one batch. The other strategies follow its noise.
    config.recipe = ConfigDict({
        "learning_rate": 0.1,  # the peak
        "batch_size": 128,
        "momentum": 0.9,  # for adam its first beta
        "epochs": 1.0,
        # How the rate falls from its peak: steps, cosine, linear, polynomial, exponential,
        # inverse_sqrt, wsd, or the dotted path of a function from progress after the warm-up (0 to
        # 1) to the share of the peak.
        "curve": "steps",
        "falls": (),  # of steps: ((epoch, factor), ...), where the rate is divided by the factor
        "final_share": 0.0,  # of the other curves: the share of the peak at the end
        "power": 1.0,  # of polynomial
        "tail_share": 0.2,  # of wsd: how much of what follows the warm-up is the tail
        "tail_shape": "linear",  # of wsd: linear, 1-sqrt, cosine
        "warmup_epochs": 0.0,
        "warmup_learning_rate": 0.0,
    })
    config.scale_up = ConfigDict({
        "learning_rate": 1.0,  # a factor of the rate; the batch grows by the same factor
        # m' instead of the recipe's m; the batch grows by (1-m)/(1-m'). None: m.
        "momentum": config_dict.placeholder(float),
    })
    config.limits = ConfigDict({
        "max_batch_size": config_dict.placeholder(int),
        "granularity": config_dict.placeholder(int),  # of batch sizes; None: ghost_size
        # The smallest factor of a growth at once. None: 2, but any at the falls of steps.
        "growth": config_dict.placeholder(float),
    })
    # What keeps its effect per example, and not per update, when the batch changes.
    config.per_example = ConfigDict({
        "momentum": config_dict.placeholder(bool),  # None: True for adam (its first beta)
        "beta2": True,  # adam's
        "weight_decay": True,  # where it is decoupled
        "ema": True,
        "momentum_floor": 0.0,  # a schedule that takes the momentum below this is refused
        "beta2_floor": 0.9,
    })


def from_argument(
    config: ConfigDict,
    argument: str,
    presets: Mapping[str, Mapping[str, Any]],
    options: Mapping[str, Mapping[str, Mapping[str, Any] | Callable]] | None = None,
) -> ConfigDict:
    """Applies a preset and then `key=value` settings to `config`, in the order of the text.

    Args:
        config: with the settings that all presets share; it is changed in place, and locked.
        argument: "preset", "preset,key=value,...", or "" for the first preset.
        presets: {preset: {dotted key: value}}.
        options: {option: {name: {dotted key: value}}}, from which `option=name` chooses, for
            example `optimizer=adam`. Options are not keys of the config. The inner dict may also
            be a function that returns it for the config so far.

    Returns:
        `config`.

    Raises:
        Mistake: if a preset, option or key is unknown, or a value has the wrong type.
    """
    options = options or {}
    config.lock()
    _unlock_free_groups(config)
    preset, *settings = _split(argument) or [next(iter(presets))]
    if "=" in preset:
        settings, preset = [preset, *settings], next(iter(presets))
    _set_all(config, _choose("preset", preset, presets))
    for setting in settings:
        key, separator, text = setting.partition("=")
        if not separator:
            raise Mistake(f"{setting!r} is no setting; write key=value after the preset.")
        if key in options:
            chosen = _choose(key, text, options[key])
            _set_all(config, chosen(config) if callable(chosen) else chosen)
        else:
            set_from_text(config, key, text)
    return config


def set_from_text(config: ConfigDict, key: str, text: str) -> None:
    """Sets the dotted `key` from the text of a command line, without changing the key's type.

    A new key of `data.options` or `optimizer.options` takes its type from the text.

    Raises:
        Mistake: if there is no such key, or the text is no value of its type.
    """
    group, name = _find(config, key)
    if name not in group:
        group[name] = _parse_free(text)
        return
    kind = group.get_type(name)
    try:
        group[name] = None if text == "None" and key in MAY_BE_NONE else _parse(text, kind)
    except (ValueError, SyntaxError, TypeError):
        raise Mistake(
            f"config.{key} takes {_describe(kind)}{' or None' * (key in MAY_BE_NONE)} (it is "
            f"{group[name]!r}), not {text!r}."
        ) from None


def saved_config(run: Mapping[str, Any]) -> ConfigDict:
    """The config that a run was saved with, with defaults for keys that are newer than the run.

    The default of a new key is what runs did before the key existed, so old runs can be continued.
    A function that was moved within the package is given its present path.

    Args:
        run: the content of run.json: its `config`, and its `version`, which version 0.1 left out.
    """
    filled = base_config()
    with filled.unlocked():
        _fill(filled, run["config"])
        wide_resnet = filled.network == "bigbatch.models.wide_resnet.WideResNet"
        if "version" not in run and wide_resnet and "same_padding" not in filled.model:
            filled.model.same_padding = True  # version 0.1 had no other padding
        if "exchange" not in run["config"] and filled.optimizer.name == "adam":
            # There was no other exchange, and nothing was kept per example.
            filled.exchange = "linear"
            filled.per_example.update({"momentum": False, "beta2": False, "weight_decay": False})
        filled.data.name = MOVED.get(filled.data.name, filled.data.name)
    return filled


def _fill(config: ConfigDict, saved: Mapping[str, Any]) -> None:
    """Sets the values of `saved` in `config`, group by group; `model` and `options` as a whole."""
    for key, value in saved.items():
        if isinstance(value, Mapping) and key in config and key not in ("model", "options"):
            _fill(config[key], value)
        else:
            config[key] = ConfigDict(value) if isinstance(value, Mapping) else value


def make_recipe(config: ConfigDict) -> schedule.Recipe:
    """The recipe of a config, after its `scale_up`, as its strategy follows it.

    Raises:
        Mistake: if a value is outside its range, or the scaled-up batch is no multiple of the
            granularity.
    """
    options, keep = config.optimizer, config.per_example
    adam = options.name == "adam"
    reads_beta2 = adam or "beta2" in options.get("options", {}).values()
    recipe = schedule.Recipe(
        **{
            **config.recipe.to_dict(),
            "falls": schedule.pairs("recipe.falls", config.recipe.falls),
            "curve": _curve(config.recipe.curve),
        },
        examples=config.data.train_examples, exchange=exchange(config), beta2=options.beta2,
        weight_decay=options.weight_decay, average=config.ema,
        accumulates=options.name in ("momentum", "nesterov"),
        per_example=schedule.PerExample(
            momentum=adam if keep.momentum is None else keep.momentum,
            beta2=keep.beta2 and reads_beta2, weight_decay=keep.weight_decay, average=keep.ema,
            momentum_floor=keep.momentum_floor, beta2_floor=keep.beta2_floor),
    )
    granularity = config.limits.granularity or config.ghost_size
    # `plan_phases` refuses a wrong batch size by the key that sets it.
    if (config.scale_up.learning_rate, config.scale_up.momentum) != (1.0, None):
        recipe = schedule.scale_up(
            recipe, config.scale_up.learning_rate, config.scale_up.momentum, granularity)
    return schedule.stated(recipe, config.strategy)


def exchange(config: ConfigDict) -> str:
    """The exchange of a config: its own, or that of its optimizer.

    Raises:
        Mistake: if the config leaves it to an optimizer that has none.
    """
    if config.exchange != BY_OPTIMIZER:
        return config.exchange
    if config.optimizer.name not in OPTIMIZERS:
        raise Mistake(
            f"config.exchange is {BY_OPTIMIZER!r}, but the optimizer {config.optimizer.name!r} is "
            f"your own; set it to one of {', '.join(schedule.EXCHANGES)}: the rate is multiplied by"
            " the batch's growth, by its square root, or not at all."
        )
    return OPTIMIZERS[config.optimizer.name]


def _curve(name: str) -> str | Callable[[float], float]:
    """A curve of `schedule` by its name, or a function of the user's as one of Python's numbers."""
    if not dotted.is_dotted(name):
        return name
    return _called_on_host(dotted.resolve(name, "config.recipe.curve"))


@functools.lru_cache(maxsize=16)  # the schedule remembers what it has found out about a function
def _called_on_host(function: Callable) -> Callable[[float], float]:
    """The function as one of Python's numbers, were it written with JAX, as Optax's schedules are.

    It is computed on the CPU, because a result from an accelerator would have to wait there behind
    the updates under way.
    """
    @functools.wraps(function)
    def share(progress: float) -> float:
        import jax  # only a config with such a curve needs it

        try:
            on_host = jax.local_devices(backend="cpu")[0]
        except RuntimeError:  # JAX_PLATFORMS leaves the CPU out
            on_host = None
        with jax.default_device(on_host):
            found = function(progress)
        return float(found) if hasattr(found, "__float__") else found

    return share


def make_strategy(config: ConfigDict) -> schedule.Strategy:
    """How the config chooses its batches.

    Raises:
        Mistake: if its pairs of numbers are none.
    """
    return schedule.Strategy(
        config.strategy, config.hybrid_falls,
        schedule.pairs("by_hand", config.by_hand), schedule.pairs("ramp", config.ramp))


def make_limits(config: ConfigDict) -> schedule.Limits:
    """The limits that a config sets on the batch size."""
    return schedule.Limits(**config.limits.to_dict(), ghost_size=config.ghost_size)


def make_phases(config: ConfigDict) -> tuple[schedule.Phase, ...]:
    """The phases of a config, by its recipe, strategy and limits.

    Raises:
        Mistake: if there is no schedule for these.
    """
    return schedule.plan_phases(make_recipe(config), make_strategy(config), make_limits(config))


def make_layouts(
    config: ConfigDict, phases: Sequence[schedule.Phase], devices: int
) -> list[Layout]:
    """The layout of the updates of each phase on `devices` devices.

    Raises:
        Mistake: if a ghost batch is larger than `max_per_device_batch`.
    """
    return [
        make_layout(phase.batch_size, config.ghost_size, devices,
                    config.max_per_device_batch, config.microbatches)
        for phase in phases
    ]


def make_due(config: ConfigDict, total: int) -> Callable[[str, int, int], bool]:
    """`schedule.due.make_due` for the intervals `..._every_epochs` of a config.

    Args:
        config: of the run.
        total: the examples of the whole run.
    """
    every = {what: config[f"{what}_every_epochs"] for what in ("log", "eval", "checkpoint")}
    return due.make_due(every, config.data.train_examples, total)


def evaluations(
    config: ConfigDict, phases: Sequence[schedule.Phase], examples_seen: int, total: int
) -> Iterator[int]:
    """The examples seen at each evaluation of a run from `examples_seen` on.

    Args:
        config: of the run.
        phases: those still to run.
        examples_seen: the position of the run.
        total: the examples of the whole run.
    """
    every = due.interval(config.eval_every_epochs, config.data.train_examples)
    for phase in phases:
        start = max(phase.start_example, examples_seen)
        yield from due.ends_due(every, start, phase.end_example, phase.batch_size, total)


def check(config: ConfigDict) -> None:
    """Checks the values of a config.

    Raises:
        Mistake: if a value is not allowed; the text has the key, its value and what is allowed.
    """
    for key, allowed in (
        ("dtype", DTYPES),
        ("strategy", schedule.STRATEGIES),
        ("exchange", (BY_OPTIMIZER, *schedule.EXCHANGES)),
        ("optimizer.weight_decay_on", WEIGHT_DECAY_ON),
        ("data.crop_style", CROP_STYLES),
        ("data.resample", RESAMPLE),
        ("data.on_bad_image", ON_BAD_IMAGE),
    ):
        group, name = _find(config, key)
        if group[name] not in allowed:
            raise Mistake(
                f"config.{key} is {group[name]!r}; allowed are {', '.join(allowed)}."
                f"{_other_name(group[name])}"
            )
    _check_plain(config)
    _check_optimizer(config)
    for key, (allowed, least, most) in ELEMENT_RANGES.items():
        group, name = _find(config, key)
        if not all(_is_number(value) and least <= value <= most for value in group[name]):
            raise Mistake(f"config.{key} is {tuple(group[name])}; its values must {allowed}.")
    for key, (allowed, least, below) in RANGES.items():
        group, name = _find(config, key)
        if not least <= group[name] < below:
            raise Mistake(f"config.{key} is {group[name]}; it must {allowed}.")
    if config.optimizer.name == "adam" and config.scale_up.momentum is not None:
        raise Mistake(
            f"config.scale_up.momentum is {config.scale_up.momentum:g}, but Adam averages the "
            "gradients with its first beta, so a larger one does not lengthen the steps and the "
            "batch cannot grow with it; set it to None, or use optimizer.name=momentum."
        )
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
            f"{_other_name(options.name)}"
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
    for key, whole in _items(config):
        for value in _leaves(whole):
            if value is None or isinstance(value, bool | int | float | str | type):
                continue
            change = ("call its .tolist()" if hasattr(value, "tolist") else
                      "name it by its dotted path" if callable(value) else "change its type")
            raise Mistake(
                f"config.{key} has a value of the type {type(value).__name__}; allowed are numbers,"
                f" texts, True, False, None, and tuples, lists and dicts of them: {change}."
            )


def _items(group: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted key with its value."""
    for name in group:
        value = group[name]
        if isinstance(value, ConfigDict):
            yield from _items(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _leaves(value: Any) -> list[Any]:
    """A value, or the values inside of a tuple, list or dict."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if not isinstance(value, tuple | list):
        return [value]
    return [leaf for inner in value for leaf in _leaves(inner)]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: Any) -> float:
    """`value` as a float; a TypeError if it is something else, were it a text of digits."""
    if not _is_number(value):
        raise TypeError
    return float(value)


def _set_all(config: ConfigDict, settings: Mapping[str, Any]) -> None:
    for key, value in settings.items():
        group, name = _find(config, key)
        group[name] = value


def _choose(what: str, name: str, choices: Mapping[str, Any]) -> Any:
    if name not in choices:
        raise Mistake(f"{what} {name!r} is unknown; allowed are {', '.join(choices)}."
                      f"{_other_name(name)}")
    return choices[name]


def _find(config: ConfigDict, key: str) -> tuple[ConfigDict, str]:
    """The group that holds the dotted `key`, and the key's last part.

    Of the groups in `FREE` the key need not be there yet.
    """
    group = config
    *path, name = key.split(".")
    for depth, part in enumerate([*path, name]):
        if path in FREE and depth == len(path) and part.isidentifier() and part not in group:
            return group, part
        if not isinstance(group, ConfigDict) or part not in group:
            parent = ".".join(["config", *key.split(".")[:depth]])
            if not isinstance(group, ConfigDict):
                raise Mistake(f"config.{key} is unknown: {parent} is a value, not a group.")
            what = {"data": "a loader", "optimizer": "an optimizer"}.get(".".join(path))
            own = (f" A key for {what} of your own is config.{path[0]}.options.{part}."
                   if depth == len(path) and what else "")
            raise Mistake(
                f"config.{key} is unknown{_near(config, key)}; {parent} has "
                f"{', '.join(sorted(group)) or 'no keys, as its config file gives it none'}.{own}"
            )
        if depth < len(path):
            group = group[part]
    if isinstance(group[name], ConfigDict):
        keys = ", ".join(f"{key}.{inner}" for inner in sorted(group[name]))
        keys = keys or (f"{key}.NAME, with a name of your own" if key.split(".") in FREE else
                        "it has none, as its config file gives it none")
        raise Mistake(f"config.{key} is a group; set one of its keys: {keys}.")
    return group, name


def _near(config: ConfigDict, key: str) -> str:
    """A hint at keys of the same name in other groups, or else at the most similar key."""
    keys = sorted(key for key, _ in _items(config))
    named = [known for known in keys if known.rpartition(".")[2] == key.rpartition(".")[2]]
    group, _, name = key.rpartition(".")
    beside = [known.rpartition(".")[2] for known in keys if known.rpartition(".")[0] == group]
    near = named or (
        [f"{group}.{close}".lstrip(".") for close in difflib.get_close_matches(name, beside, n=1)]
        if beside else difflib.get_close_matches(key, keys, n=1))
    return f" (did you mean {' or '.join(near)}?)" if near else ""


def refusal(configs: Sequence[ConfigDict], group: Any, name: Any, value: Any) -> str:
    """Why a config refused to read or to set a key; "" if that cannot be told.

    Args:
        configs: those that may be the whole config.
        group: the group of one of them that refused.
        name: of the key.
        value: that it was to be set to.
    """
    for config in configs:
        prefix = next((prefix for prefix, one in _groups(config) if one is group), None)
        if prefix is None or "seed" not in config:  # a part of the config, or none at all
            continue
        try:
            _find(config, f"{prefix}{name}")
        except Mistake as mistake:
            return str(mistake)
        kind = group.get_type(name)
        return (f"config.{prefix}{name} takes {_describe(kind)} (it is {group[name]!r}), "
                f"not {value!r}.")
    return ""


def _groups(group: ConfigDict, prefix: str = "") -> Iterator[tuple[str, ConfigDict]]:
    """A group and every one inside of it, each with what its keys begin with."""
    yield prefix, group
    for name in group:
        if isinstance(group[name], ConfigDict):
            yield from _groups(group[name], f"{prefix}{name}.")


def _unlock_free_groups(config: ConfigDict) -> None:
    """Lets a config file put keys of its own into the groups that are the user's."""
    config.model.unlock()
    config.data.options.unlock()
    config.optimizer.options.unlock()


def _other_name(name: str) -> str:
    """A sentence about what bigbatch has under another name."""
    is_adamw = isinstance(name, str) and name.lower() == "adamw"
    return " AdamW is adam with config.optimizer.decoupled=True." if is_adamw else ""


def _parse_free(text: str) -> Any:
    """`text` as the value it looks like; a text if it looks like none."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def _parse(text: str, kind: type) -> Any:
    """`text` as a value of type `kind`; a ValueError, SyntaxError or TypeError if it is none."""
    if kind is str:
        return text
    if kind is bool:
        return ("false", "true").index(text.lower()) == 1
    value = ast.literal_eval(text)
    if kind is tuple and isinstance(value, tuple | list):
        return tuple(value)
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        raise TypeError
    return value


def _describe(kind: type) -> str:
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a text",
            tuple: "a tuple in brackets", list: "a list in square brackets",
            type(None): "nothing until its config file gives it a type (config_dict.placeholder)",
            }[kind]


def _split(argument: str) -> list[str]:
    """The parts of `argument` between commas, where commas inside brackets do not count."""
    parts, depth, current = [], 0, ""
    for character in argument:
        depth += {"(": 1, "[": 1, ")": -1, "]": -1}.get(character, 0)
        if character == "," and depth == 0:
            parts.append(current)
            current = ""
        else:
            current += character
    return [part.strip() for part in [*parts, current] if part.strip()]
