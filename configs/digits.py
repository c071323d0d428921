"""scikit-learn's handwritten digits with a narrow Wide ResNet: the demonstration, for any machine.

    python -m bigbatch.main --config=configs/digits.py:increase --workdir=DIR

1 437 real 8x8 images to train with, 360 to test; 40 epochs; the noise scale is divided by 3 at 30,
60 and 80 % of them, so that each schedule takes well under a minute on two CPU cores.

| preset | batches | updates |
|---|---|---|
| decay | 16 | 3 593 |
| hybrid | 16, 48 | 1 917 |
| increase | 16, 48, 128 | 1 618 |
| ramp | 16, 32, 96, 128 | 1 034 |
| by_hand | 16, 32, 64, 128 | 1 887 |

Each takes a curve in the place of the falls, as `increase,curve=cosine` (those of cifar10.py), and
`optimizer=adam_by_sqrt`, Adam with its own exchange.

Expected test accuracy: over 98 % for the first three (see README.md for the measured numbers).
"""

from ml_collections import ConfigDict

from bigbatch.config import base_config, from_argument
from bigbatch.config_files import CONFIGS, load_file

PRESETS = {
    "decay": {"strategy": "decay"},
    "hybrid": {"strategy": "hybrid", "hybrid_falls": 1},
    "increase": {"strategy": "increase"},
    "ramp": {
        "strategy": "increase", "recipe.batch_size": 32, "recipe.learning_rate": 0.8,
        "ramp": ((3.0, 2.0),),
    },
    "by_hand": {"strategy": "by_hand", "by_hand": ((12.0, 32), (24.0, 64), (32.0, 128))},
}
OPTIMIZERS = {
    "momentum": {},
    "adam_by_sqrt": {"optimizer.name": "adam", "recipe.learning_rate": 0.004},
}
CIFAR10 = load_file(CONFIGS / "cifar10.py")
CURVES = {
    name: {key: value for key, value in settings.items() if key != "limits.max_batch_size"}
    for name, settings in CIFAR10.CURVES.items()
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
    return from_argument(config, argument, PRESETS, {"optimizer": OPTIMIZERS, "curve": CURVES})
