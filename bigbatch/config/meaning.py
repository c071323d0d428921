"""What is made of a config: its recipe, phases and layouts, and when something is due."""

import functools
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from bigbatch import dotted, schedule
from bigbatch.config import lengths
from bigbatch.config.keys import BY_OPTIMIZER, OPTIMIZERS, base_config
from bigbatch.mistake import Mistake
from bigbatch.schedule import deciding, due
from bigbatch.schedule.layout import Layout, make_layout

# What version 0.1 had in configs/small.py: {its dotted path: the one of now}.
MOVED = {
    "configs.small.half_resolution": "bigbatch.data.smaller.half_resolution",
    "configs.small.some_digits": "bigbatch.data.smaller.some_digits",
}
WHOLE = ("model", "options", "task_options")  # groups whose keys are the user's


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
    """Sets the values of `saved` in `config`, group by group; those of `WHOLE` at once."""
    for key, value in saved.items():
        if isinstance(value, Mapping) and key in config and key not in WHOLE:
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
    reads_beta2 = adam or "beta2" in options.options.values()
    recipe = schedule.Recipe(
        **{
            **config.recipe.to_dict(),
            "epochs": epochs_of(config, "recipe.epochs"),
            "warmup_epochs": epochs_of(config, "recipe.warmup_epochs"),
            "falls": _pairs(config, "recipe.falls", config.recipe.falls),
            "curve": _curve(config.recipe.curve),
        },
        examples=config.data.train_examples, exchange=exchange(config), beta2=options.beta2,
        weight_decay=options.weight_decay, average=config.ema,
        accumulates=options.name in ("momentum", "nesterov"),
        per_example=schedule.PerExample(
            momentum=adam if keep.momentum is None else keep.momentum,  # not for own optimizers
            beta2=keep.beta2 and reads_beta2, weight_decay=keep.weight_decay, average=keep.ema,
            momentum_floor=keep.momentum_floor, beta2_floor=keep.beta2_floor),
    )
    granularity = config.limits.granularity or config.ghost_size
    # `plan_phases` refuses a wrong batch size by the key that sets it.
    if (config.scale_up.learning_rate, config.scale_up.momentum) != (1.0, None):
        recipe = schedule.scale_up(
            recipe, config.scale_up.learning_rate, config.scale_up.momentum, granularity)
    return schedule.stated(recipe, config.strategy)


def epochs_of(config: ConfigDict, key: str) -> float:
    """The length that a key of `keys.LENGTHS` has, in epochs.

    Raises:
        Mistake: if it is a text that is no length.
    """
    value = functools.reduce(ConfigDict.__getitem__, key.split("."), config)
    return _in_epochs(config, value, f"config.{key}")


def in_examples(config: ConfigDict, length: str, where: str) -> int:
    """A length that a command line asks for, such as "2 epochs" or "5000 examples", in examples.

    Args:
        config: of the run that it is a part of.
        length: see `lengths`; a number alone is one of epochs.
        where: the flag that has the length, for messages.

    Raises:
        Mistake: if it is no length, or not a finite one.
    """
    try:
        length = float(length)
    except ValueError:
        length = lengths.in_epochs(
            length, config.data.train_examples, tokens_per_example(config),
            config.recipe.batch_size, where)
    if not 0 <= length * config.data.train_examples <= schedule.MOST_EXAMPLES:
        raise Mistake(f"{where} is {length:g} epochs; it must be a finite number, 0 or more.")
    return round(length * config.data.train_examples)


def tokens_per_example(config: ConfigDict) -> int | None:
    """The tokens of an example, by the function `tokens` of the config's task; None without one.

    Raises:
        Mistake: if there is no such task.
    """
    count = getattr(dotted.resolve_task(config.task, "config.task"), "tokens", None)
    return None if count is None else count(config)


def _in_epochs(config: ConfigDict, value: float | str, where: str) -> float:
    if not isinstance(value, str):
        return value  # as most are, and no task is asked
    return lengths.in_epochs(value, config.data.train_examples, tokens_per_example(config),
                             config.recipe.batch_size, where)


def _pairs(config: ConfigDict, name: str, given: Any) -> tuple[tuple[float, float], ...]:
    """`given` as pairs of (epoch, number), where an epoch may be a text with a unit."""
    if isinstance(given, tuple | list):
        given = tuple(
            (_in_epochs(config, pair[0], f"an epoch of {name}"), *pair[1:])
            if isinstance(pair, tuple | list) and pair and lengths.is_one(pair[0]) else pair
            for pair in given)
    return schedule.pairs(name, given)


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
    @functools.wraps(function, updated=())
    def share(progress: float) -> float:
        import jax  # only a config with such a curve needs it

        try:
            on_host = jax.local_devices(backend="cpu")[0]
        except RuntimeError:  # JAX_PLATFORMS leaves the CPU out
            on_host = None
        # In 32 bits whatever the environment says: the curve is part of the run.
        with jax.enable_x64(False), jax.default_device(on_host):
            try:
                return function(progress)
            except Exception as error:
                frame = traceback.extract_tb(error.__traceback__)[-1]
                raise Mistake(
                    f"config.recipe.curve: {schedule.name_of(function)}({progress:g}) fails: "
                    f"{type(error).__name__}: {error} ({frame.filename}, line {frame.lineno}). A "
                    "curve is called with the progress alone, a number from 0 to 1."
                ) from error

    return share


def make_strategy(config: ConfigDict) -> schedule.Strategy:
    """How the config chooses its batches.

    Raises:
        Mistake: if its pairs of numbers are none.
    """
    return schedule.Strategy(
        config.strategy, config.hybrid_falls,
        _pairs(config, "by_hand", config.by_hand), _pairs(config, "ramp", config.ramp))


def make_limits(config: ConfigDict) -> schedule.Limits:
    """The limits that a config sets on the batch size."""
    return schedule.Limits(**config.limits.to_dict(), ghost_size=config.ghost_size)


def make_phases(
    config: ConfigDict, decisions: schedule.Decisions | None = None
) -> tuple[schedule.Phase, ...]:
    """The phases of a config, by its recipe, strategy and limits.

    Args:
        config: of the run.
        decisions: of the run so far, which the strategy "measured" makes. The phases before the
            last decision stay what they are, whatever is decided later. None: those of a run that
            grows as soon as it may, in which every batch comes that can come.

    Raises:
        Mistake: if there is no schedule for these.
    """
    recipe, limits, strategy = make_recipe(config), make_limits(config), make_strategy(config)
    if strategy.name == "measured":
        if decisions is None:
            rule, rungs = make_rule(config), deciding.ladder(recipe, limits)
            deciding.check_reach(rule, rungs)
            decisions = deciding.soonest(recipe, rule, rungs)
        strategy = strategy._replace(decisions=decisions)
    return schedule.plan_phases(recipe, strategy, limits)


def make_rule(config: ConfigDict) -> deciding.Rule:
    """How the strategy "measured" of a config decides.

    Raises:
        Mistake: if a value of `config.measured` is not allowed.
    """
    keys, n = config.measured, config.data.train_examples
    rule = deciding.Rule(
        keys.rule, keys.threshold, _pairs(config, "measured.losses", keys.losses),
        due.interval(epochs_of(config, "measured.every_epochs"), n),
        round(epochs_of(config, "measured.stay_epochs") * n))
    deciding.check(rule)
    return rule


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
    every = {what: epochs_of(config, f"{what}_every_epochs")
             for what in ("log", "eval", "checkpoint")}
    if noise := epochs_of(config, "noise.every_epochs"):
        every["noise"] = noise
    return due.make_due(every, config.data.train_examples, total, _intervals_from(config))


def noise_window(config: ConfigDict) -> int:
    """The examples over which a run averages the noise scale of its updates."""
    return due.interval(epochs_of(config, "noise.window_epochs"), config.data.train_examples)


def noise_layout(config: ConfigDict, devices: int) -> Layout | None:
    """The layout of the ghost batches that are measured one by one; None if none ever are."""
    if not epochs_of(config, "noise.every_epochs"):
        return None
    size = config.ghost_size
    if config.sharding.parameters:
        # A pass adds up its devices' gradients, so it is one ghost batch, and the others pad.
        return Layout(config.noise.ghosts, devices, config.noise.ghosts, 1, alone=True)
    return make_layout(config.noise.ghosts * size, size, devices, size, 0)


def evaluations(
    config: ConfigDict, phases: Sequence[schedule.Phase], examples_seen: int, total: int,
    key: str = "eval_every_epochs",
) -> Iterator[int]:
    """The examples seen at each evaluation of a run from `examples_seen` on.

    Args:
        config: of the run.
        phases: those still to run.
        examples_seen: the position of the run.
        total: the examples of the whole run.
        key: of the interval, for something else than evaluations; with 0 it is never due.
    """
    epochs = epochs_of(config, key)
    if not epochs:
        return
    every = due.interval(epochs, config.data.train_examples)
    for phase in phases:
        start = max(phase.start_example, examples_seen)
        yield from due.ends_due(every, start, phase.end_example, phase.batch_size, total,
                                _intervals_from(config))


def _intervals_from(config: ConfigDict) -> int:
    """The example from which the intervals of a config are counted."""
    return round(epochs_of(config, "intervals_from") * config.data.train_examples)
