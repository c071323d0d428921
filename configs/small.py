"""Every curve of the paper's Figures 2 to 7 and of section 5.4, for a laptop: the same schedules.

    python -m bigbatch.main --config=configs/small.py:increase --config.data.dir=DIR --workdir=RUN

The presets have the names of configs/cifar10.py, configs/imagenet_inception_resnet_v2.py and
configs/imagenet_resnet50.py, and their falls of the noise at the same fractions of training. All
train a narrow Wide ResNet 10-1 on 5 120 CIFAR-10 images at half resolution. That keeps what the
paper is about, the ratios: of batches to each other, of updates between schedules, of the largest
batch to N (N/8; the paper's 5120 is N/9.8), of noise scales. It does not keep accuracies, which
are far below the paper's, nor what momentum costs: as many epochs are lost, of ten times fewer.

| preset | batches | updates | the paper's preset |
|---|---|---|---|
| decay, hybrid, increase | 16; 16, 80; 16, 80, 400, 2000 | 6 554; 2 847; 2 368 | cifar10's |
| figure5_* | 16; 16 to 640; 80 to 640; 400 to 640 | 6 554; 2 392; 529; 193 | cifar10's |
| figure6_decay, figure6_increase | 32; 32, 320 | 2 880; 1 152 | Inception-ResNet-V2 |
| figure7_momentum_* | 32, 256; 64, 256; 128, 256 | 1 200; 720; 480 | Inception-ResNet-V2 |
| batch_8k, thirty_minutes, batch_16k | 32; 32, 64; 64 | 2 880; 1 920; 1 440 | ResNet-50 |

`optimizer=` momentum, nesterov, sgd or adam as in configs/cifar10.py. `data=digits` in the place of
CIFAR-10 takes scikit-learn's 8x8 digits, which need no download: 1 280 images, batches a quarter.
A run takes one to two and a half minutes on one CPU core, a quarter of a minute with the digits.

The data: TFDS's `cifar10` as ArrayRecord files, see README.md; `data.dir=FOLDER` says where.
"""

from typing import Any

from ml_collections import ConfigDict

from bigbatch.config import base_config, from_argument
from bigbatch.config_files import CONFIGS, load_file

CIFAR10 = load_file(CONFIGS / "cifar10.py")
# A batch that follows a curve grows to a tenth of the set here too.
CURVES = {
    name: settings | {"limits.max_batch_size": 512} if settings else {}
    for name, settings in CIFAR10.CURVES.items()
}

FIGURE_5 = {"strategy": "increase", "limits.max_batch_size": 640}
# A fifth of ImageNet's epochs and about as many updates in each: N/B is 156 there, 160 here.
IMAGENET = {
    "recipe.epochs": 18.0, "recipe.falls": ((6.0, 10.0), (12.0, 10.0), (16.0, 10.0)),
    "recipe.learning_rate": 0.2, "recipe.batch_size": 32, "eval_every_epochs": 1.0,
}
FIGURE_7 = IMAGENET | {"strategy": "increase", "limits.max_batch_size": 256}
RESNET_50 = IMAGENET | {
    "optimizer.name": "nesterov", "optimizer.weight_decay_on": "no_norms",
    "recipe.warmup_epochs": 1.0, "recipe.warmup_learning_rate": 0.02,
}
PRESETS = {
    "decay": {"strategy": "decay"},
    "hybrid": {"strategy": "hybrid", "hybrid_falls": 1},
    "increase": {"strategy": "increase"},
    "figure5_original": {"strategy": "decay"},
    "figure5_increasing_batch": FIGURE_5,
    "figure5_increased_lr": FIGURE_5 | {"scale_up.learning_rate": 5.0},
    "figure5_increased_momentum": FIGURE_5 | {
        "scale_up.learning_rate": 5.0, "scale_up.momentum": 0.98,
    },
    "figure6_decay": IMAGENET | {"strategy": "decay"},
    "figure6_increase": IMAGENET | {"strategy": "hybrid", "hybrid_falls": 1},
    "figure7_momentum_0.9": FIGURE_7,
    "figure7_momentum_0.95": FIGURE_7 | {"scale_up.momentum": 0.95},
    "figure7_momentum_0.975": FIGURE_7 | {"scale_up.momentum": 0.975},
    "batch_8k": RESNET_50 | {"strategy": "decay"},
    "thirty_minutes": RESNET_50 | {"strategy": "increase", "limits.max_batch_size": 64},
    "batch_16k": RESNET_50 | {"strategy": "decay", "scale_up.learning_rate": 2.0},
}


def digits(config: ConfigDict) -> dict[str, Any]:
    """The settings that put the digits in CIFAR-10's place, with all batches a quarter."""
    limit = config.limits.max_batch_size
    return {
        "recipe.batch_size": config.recipe.batch_size // 4,
        "limits.max_batch_size": limit and limit // 4, "ghost_size": 4, "model.channels": 1,
        "model.bn_decay": 0.998, "data.name": "bigbatch.data.smaller.some_digits",
        "data.train_split": "train", "data.test_split": "test",
        "data.train_examples": 1280, "data.test_examples": 360, "data.image_size": 8,
        "data.mean": (73.0,), "data.std": (90.0,),
        "data.augment.pad": 1, "data.augment.crop": 8, "data.augment.flip": False,
    }


def get_config(argument: str = "") -> ConfigDict:
    """The config of `preset,key=value,...`; the first preset where none is named."""
    config = base_config()
    config.recipe.update({
        "learning_rate": 0.1, "batch_size": 16, "momentum": 0.9, "epochs": 20.48,
        "falls": ((6.0, 5.0), (12.0, 5.0), (16.0, 5.0)),
    })
    config.optimizer.weight_decay = 5e-4
    config.ghost_size = 16
    config.model = ConfigDict({
        "ghost_size": config.get_ref("ghost_size"), "depth": 10, "width": 1, "channels": 3,
        # The window of CIFAR-10's 0.9 with ghost batches of 128.
        "bn_decay": 0.99, "same_padding": False,
    })
    config.data.update({
        "name": "bigbatch.data.smaller.half_resolution", "train_split": "train[:5120]",
        "test_split": "test[:5000]", "train_examples": 5120, "test_examples": 5000,
        "num_classes": 10, "image_size": 16,
        "mean": (125.3, 123.0, 113.9), "std": (63.0, 62.1, 66.7),
        "augment": {"pad": 2, "crop": 16, "flip": True},
    })
    config.log_every_epochs = 0.032
    config.eval_every_epochs = 1.024
    config.checkpoint_every_epochs = 5.0
    config.tensorboard = False
    return from_argument(config, argument, PRESETS, {
        "optimizer": CIFAR10.OPTIMIZERS, "curve": CURVES, "data": {"cifar10": {}, "digits": digits},
    })
