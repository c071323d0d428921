"""Figures 1, 2, 3a and 5 of the paper in hours: its batches and rates, a small network, 30 epochs.

    python -m bigbatch.main --config=configs/medium.py:increase --config.data.dir=DIR --workdir=RUN

Presets and all else are those of configs/cifar10.py: all 50 000 CIFAR-10 images at 32x32, batch 128
and learning rate 0.1, noise scales, weight decay, ghost batches of 128 (N and the batches being the
paper's, so is what one statistic is taken over). What differs: a Wide ResNet 10-1 in the place of
the 16-4, and 30 epochs in the place of 204.8, with the noise falling at the same fractions of
training. Accuracies are below the paper's. What momentum costs is not in its ratio: as many epochs
are lost, of seven times fewer.

| preset | batches | updates |
|---|---|---|
| decay, figure5_original | 128 | 11 719 |
| hybrid | 128, 640 | 5 091 |
| increase | 128, 640, 3200, 16000 | 4 234 |
| figure5_increasing_batch | 128, 640, 3200, 5120 | 4 277 |
| figure5_increased_lr | 640, 3200, 5120 | 946 |
| figure5_increased_momentum | 3200, 5120 | 345 |

A run takes about an hour on one CPU core. The data: TFDS's `cifar10` as ArrayRecord files, see
README.md; `data.dir=FOLDER` says where.
"""

from ml_collections import ConfigDict

from bigbatch.config import from_argument
from bigbatch.config_files import CONFIGS, load_file

cifar10 = load_file(CONFIGS / "cifar10.py")
PRESETS = {name: settings for name, settings in cifar10.PRESETS.items()
           if name not in ("ramp", "by_hand")}  # their epochs are those of 204.8
EPOCHS = 30.0


def get_config(argument: str = "") -> ConfigDict:
    """The config of `preset,key=value,...`; the first preset where none is named."""
    config = cifar10.get_config()
    share = EPOCHS / config.recipe.epochs
    config.recipe.falls = tuple((epoch * share, factor) for epoch, factor in config.recipe.falls)
    config.recipe.epochs = EPOCHS
    config.model.update({"depth": 10, "width": 1})
    config.checkpoint_every_epochs = 2.0
    config.tensorboard = False
    return from_argument(config, argument, PRESETS, {
        "optimizer": cifar10.OPTIMIZERS, "curve": cifar10.CURVES})
