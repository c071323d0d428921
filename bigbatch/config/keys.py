"""The keys of a config, with their defaults.

A config file defines `get_config(argument)`, which starts from `base_config()`. The argument is the
text after the colon in `--config=file.py:preset,key=value`.
"""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict, config_dict

from bigbatch.config.lengths import Length

DTYPES = ("float32", "bfloat16", "float64")
# The exchange of each optimizer, where config.exchange does not say: see schedule.rates.
OPTIMIZERS = {"momentum": "linear", "nesterov": "linear", "sgd": "linear", "adam": "sqrt"}
BY_OPTIMIZER = "by_optimizer"
WEIGHT_DECAY_ON = ("all", "no_norms", "no_norms_or_biases")
CROP_STYLES = ("goyal", "inception", "none")
RESAMPLE = ("bicubic", "bilinear")
MEASURED_BY = ("norms", "all")
ON_BAD_IMAGE = ("stop", "skip")
# The groups whose keys need not be known.
FREE = (["data", "options"], ["optimizer", "options"], ["task_options"])
# These take a number of epochs, or a text with a unit: see `lengths`. So do the epochs in the pairs
# of recipe.falls, by_hand and ramp.
LENGTHS = ("recipe.epochs", "recipe.warmup_epochs", "log_every_epochs", "eval_every_epochs",
           "checkpoint_every_epochs", "intervals_from", "measured.every_epochs",
           "measured.stay_epochs", "noise.every_epochs", "noise.window_epochs")


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

    # Dotted path of a task: what an example is, what the network sees of it, how it is judged. See
    # bigbatch/tasks/__init__.py.
    config.task = "bigbatch.tasks.classification"
    config.task_options = ConfigDict()  # keys of your own, for a task of your own

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
        "num_classes": 10,  # the network's first argument: the width of its output, for any task
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
    # How a state that is too large for a device is split over several: see docs/sharding.md.
    config.sharding = ConfigDict({
        "optimizer": False,  # split the optimizer's state, and the average of `ema`
        "parameters": False,  # split the parameters too; the optimizer's state then is as well
        # How many devices hold one whole state between them, such as those of a host; 0: all. The
        # others hold copies.
        "shards": 0,
        "smallest": 16_384,  # arrays with fewer numbers, or one axis, are whole on each device
        # ((pattern, axis), ...) in the place of the rule, such as (("blocks/*/up/kernel", 0),): the
        # axis along which to cut the parameters whose paths fit the pattern; None: whole.
        "axes": (),
    })
    config.deterministic = False  # GPUs compute the same bits at every start; see docs/promises.md
    config.max_per_device_batch = 1024  # examples a device takes in one pass at most
    config.microbatches = 0  # passes of an update; 0: those that take least time
    config.eval_batch_size = 500  # examples on each device
    config.log_every_epochs = Length(0.1)
    config.eval_every_epochs = Length(1.0)
    config.checkpoint_every_epochs = Length(10.0)
    config.intervals_from = Length(0.0)  # the position from which intervals are counted
    # How the noise scale of the gradient is measured: see docs/noise.md.
    config.noise = ConfigDict({
        # Over how much of the run that of every update, by the norms, is averaged; 0: not at all.
        "window_epochs": Length("200 updates"),
        # How often it is measured by all parameters, which takes passes of its own; 0: never.
        "every_epochs": Length(0.0),
        "by_groups": config_dict.placeholder(bool),  # by devices and passes too; docs/noise.md
        "ghosts": 32,  # the coming ghost batches that are then measured, one by one
    })
    config.keep_checkpoints = 2  # the newest ones; those at phase boundaries are kept too
    config.tensorboard = True
    config.lock()  # so that a misspelt key in a config file is an error and not a new key
    unlock_free_groups(config)
    return config


def _add_schedule(config: ConfigDict) -> None:
    """Adds the keys that decide the batches and the rates; see `bigbatch.schedule`."""
    # How the noise falls: by the rate (decay), by the batch (increase), first by the batch and then
    # by the rate (hybrid), with batches given by hand (by_hand), or not at all (constant). See
    # schedule.plan_phases. With measured, the run itself decides when its batch grows.
    config.strategy = "increase"
    config.hybrid_falls = 1  # for hybrid: how many falls, or growths of the batch, are the batch's
    config.by_hand = ()  # for by_hand: ((epoch, batch), ...), each batch from its epoch on
    config.measured = ConfigDict({
        "rule": "noise",  # noise, norm_test, adascale, cabs, loss: see bigbatch.schedule.deciding
        "threshold": config_dict.placeholder(float),  # of the rule; None: its default
        "losses": (),  # of loss: ((training loss, batch that it allows), ...)
        # What the rule reads of the noise: by the scales and biases of the norms, in every update
        # (norms), or by all parameters, whenever config.noise.every_epochs has it measured (all).
        "by": "norms",
        "every_epochs": Length("50 updates"),  # between two decisions
        "stay_epochs": Length("200 updates"),  # how long a batch stays at least
    })
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
        "epochs": Length(1.0),
        # How the rate falls from its peak: steps, cosine, linear, polynomial, exponential,
        # inverse_sqrt, wsd, or the dotted path of a function from progress after the warm-up (0 to
        # 1) to the share of the peak.
        "curve": "steps",
        "falls": (),  # of steps: ((epoch, factor), ...), where the rate is divided by the factor
        "final_share": 0.0,  # of the other curves: the share of the peak at the end
        "power": 1.0,  # of polynomial
        "tail_share": 0.2,  # of wsd: how much of what follows the warm-up is the tail
        "tail_shape": "linear",  # of wsd: linear, 1-sqrt, cosine
        "warmup_epochs": Length(0.0),
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


def items(group: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted key with its value."""
    for name in group:
        value = group[name]
        if isinstance(value, ConfigDict):
            yield from items(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def unlock_free_groups(config: ConfigDict) -> None:
    """Lets a config file put keys of its own into the groups that are the user's."""
    config.model.unlock()
    config.data.options.unlock()
    config.optimizer.options.unlock()
    config.task_options.unlock()


def other_name(name: str) -> str:
    """A sentence about what bigbatch has under another name."""
    is_adamw = isinstance(name, str) and name.lower() == "adamw"
    return " AdamW is adam with config.optimizer.decoupled=True." if is_adamw else ""


# The keys that take None, beside those of FREE, whose values are the user's.
MAY_BE_NONE = tuple(key for key, value in items(base_config()) if value is None)
