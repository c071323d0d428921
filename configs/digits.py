"""scikit-learn's handwritten digits with a narrow Wide ResNet: the demonstration, for any machine.

    python -m bigbatch.main --config=configs/digits.py:increase --workdir=DIR

1 437 real 8x8 images to train with, 360 to test; 40 epochs; the noise scale is divided by 3 at 30,
60 and 80 % of them, so that each schedule takes well under a minute on two CPU cores.

| preset | batches | updates |
|---|---|---|
| decay | 16 | 3 593 |
| hybrid | 16, 48 | 1 917 |
| increase | 16, 48, 128 | 1 618 |

Expected test accuracy: over 98 % for all three (see README.md for the measured numbers).
"""

from ml_collections import ConfigDict

from bigbatch.config import base_config, from_argument

PRESETS = {
    "decay": {"strategy": "decay"},
    "hybrid": {"strategy": "hybrid", "hybrid_falls": 1},
    "increase": {"strategy": "increase"},
}


def get_config(argument: str = "") -> ConfigDict:
    """The config of `preset,key=value,...`; the first preset where none is named."""
    config = base_config()
    config.recipe.update({
        "learning_rate": 0.4, "batch_size": 16, "momentum": 0.9, "epochs": 40.0,
        "falls": ((12.0, 3.0), (24.0, 3.0), (32.0, 3.0)),
    })
    # About N/10, past which the approximate and the exact noise scale part.
    config.limits.max_batch_size = 128
    config.optimizer.weight_decay = 5e-4
    config.ghost_size = 16
    config.model = ConfigDict({
        "ghost_size": config.get_ref("ghost_size"), "depth": 10, "width": 1, "channels": 1,
        # 100 ghost batches of 16 are about the examples that 10 of 128 are on CIFAR-10.
        "bn_decay": 0.99, "same_padding": False,
    })
    config.data.update({
        "name": "digits", "train_examples": 1437, "test_examples": 360, "num_classes": 10,
        "image_size": 8, "mean": (73.0,), "std": (90.0,),
        # A digit is no other digit's mirror image on purpose: no flip.
        "augment": {"pad": 1, "crop": 8, "flip": False},
    })
    return from_argument(config, argument, PRESETS)
