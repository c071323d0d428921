"""ImageNet with ResNet-50 in 30 minutes: section 5.4 of the paper, on Goyal et al.'s set-up.

    python -m bigbatch.main --config=configs/imagenet_resnet50.py:thirty_minutes \
        --config.data.dir=DIR --workdir=RUN

90 epochs; the noise scale is divided by 10 at epochs 30, 60 and 80. Accuracies and times are the
paper's; a core is one of the two on a TPU v2 chip, and 256 of them half a pod. (For `batch_16k` the
paper does not say how many.)

| preset | batch | rate, after the warm-up | cores | updates | accuracy | time |
|---|---|---|---|---|---|---|
| thirty_minutes | 8192, 16 384 | 3.2, 0.64, 0.064, 0.0064 | 256, 512 | 9 384 | .761 | < 30 min |
| batch_8k | 8192 | 3.2, 0.32, 0.032, 0.0032 | 256 | 14 076 | .761 | < 45 min |
| batch_16k | 16 384 | 6.4, 0.64, 0.064, 0.0064 |  | 7 038 | .750 | 22 min |

For `thirty_minutes`, `--stop_after_phase=noise/1` ends the first slice's job at epoch 30 with a
checkpoint and status 3; the same command without it goes on from there on the second slice.

Goyal, Dollár, Girshick et al., "Accurate, Large Minibatch SGD: Training ImageNet in 1 Hour", 2017:
rate 0.1 for each 256 examples, linear warm-up from 0.1 over 5 epochs, Nesterov momentum 0.9, weight
decay 1e-4 but not on BN's scale and bias, BN over 32 images, random-resized crop and flip; tested
on the central 224 of the shorter side's 256. They take the median of the last 5 epochs. BN's decay
is 0.9 a ghost batch, as theirs is a worker's batch: the running statistics come from about the last
320 images.

`smoke=true` keeps the phases and shrinks everything else: ResNet-18 an eighth as wide, 64x64
images, batches a 512th, 9 epochs of 400 photographs. About a minute on two CPU cores.

    python -m bigbatch.main --config=configs/imagenet_resnet50.py:thirty_minutes,smoke=true ...

The data: TFDS's `imagenet2012` as ArrayRecord files, see README.md.
"""

from typing import Any

from ml_collections import ConfigDict

from bigbatch.config import base_config, from_argument

PRESETS = {
    "thirty_minutes": {
        "strategy": "increase", "limits.max_batch_size": 16_384,
    },
    "batch_8k": {"strategy": "decay"},
    "batch_16k": {"strategy": "decay", "scale_up.learning_rate": 2.0},
}


def smoke(config: ConfigDict) -> dict[str, Any]:
    """The settings that make a preset small."""
    limit = config.limits.max_batch_size
    return {
        "dtype": "float32", "ghost_size": 8, "model.depth": 18, "model.width": 8,
        "recipe.batch_size": config.recipe.batch_size // 512,
        "limits.max_batch_size": limit and limit // 512,
        "recipe.learning_rate": 0.1, "recipe.epochs": 9.0,
        "recipe.falls": ((3.0, 10.0), (6.0, 10.0), (8.0, 10.0)),
        "recipe.warmup_epochs": 0.5, "recipe.warmup_learning_rate": 0.01,
        "data.train_split": "train[:400]", "data.train_examples": 400,
        "data.test_split": "validation[:100]", "data.test_examples": 100,
        "data.image_size": 64, "data.workers": 0, "eval_batch_size": 25,
    }


def get_config(argument: str = "") -> ConfigDict:
    """The config of `preset,key=value,...`; the first preset where none is named."""
    config = base_config()
    config.recipe.update({
        "learning_rate": 3.2, "batch_size": 8192, "momentum": 0.9, "epochs": 90.0,
        "falls": ((30.0, 10.0), (60.0, 10.0), (80.0, 10.0)),
        "warmup_epochs": 5.0, "warmup_learning_rate": 0.1,
    })
    config.optimizer.update({
        "name": "nesterov", "weight_decay": 1e-4, "weight_decay_on": "no_norms",
    })
    config.dtype = "bfloat16"
    config.ghost_size = 32
    config.network = "bigbatch.models.resnet.ResNet"
    config.model = ConfigDict({
        "ghost_size": config.get_ref("ghost_size"), "depth": 50, "width": 64, "bn_decay": 0.9,
        "space_to_depth": False,
    })
    config.max_per_device_batch = 128
    config.data.update({
        "name": "imagenet2012", "train_split": "train", "test_split": "validation",
        "train_examples": 1_281_167, "test_examples": 50_000, "num_classes": 1000,
        "image_size": 224, "mean": (123.675, 116.28, 103.53), "std": (58.395, 57.12, 57.375),
        "streaming": True, "crop_style": "goyal", "eval_share": 0.875, "resample": "bicubic",
        "workers": 6, "read_threads": 2, "augment": {"pad": 0, "crop": 0, "flip": True},
    })
    config.log_every_epochs = 0.05
    config.checkpoint_every_epochs = 2.0
    config.eval_batch_size = 125
    return from_argument(config, argument, PRESETS, {"smoke": {"true": smoke, "false": {}}})
