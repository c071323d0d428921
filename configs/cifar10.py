"""CIFAR-10 with a Wide ResNet 16-4: every curve of Figures 1 to 5 of the paper.

    python -m bigbatch.main --config=configs/cifar10.py:increase --workdir=DIR

204.8 epochs; the noise scale is divided by 5 at epochs 60, 120 and 160. Hardware: the paper does
not say; one accelerator is enough. Final test accuracies are the paper's, updates are at 204.8
epochs.

| preset | figure | updates | test accuracy |
|---|---|---|---|
| decay | 1-4, "decaying learning rate" | 80 000 | .9425-.945 (3a), .943-.945 (3b) |
| hybrid | 1-4, "hybrid" | 34 751 | as decay |
| increase | 1-4, "increasing batch size" | 28 891 | as decay |
| figure5_original | 5, "original schedule" | 80 000 | .943 |
| figure5_increasing_batch | 5, "increasing batch size" | 29 189 | .944 |
| figure5_increased_lr | 5, "increased initial learning rate" | 6 454 | .945 |
| figure5_increased_momentum | 5, "increased momentum coefficient" | 2 352 | .933 |
| ramp | | 9 814 | |
| by_hand | | 30 822 | |

Not of the paper: `ramp` begins with batches of 128 and 256 before its 512, and `by_hand` has its
batches written down. `decay`, `hybrid` and `increase` also take an optimizer, as
`increase,optimizer=adam`: momentum (the default; Figures 2 and 3a), nesterov (3b), sgd (4a,
.934-.9365), adam (4b, rates a hundredth of the others', .928-.931), and adam_by_sqrt, with Adam's
own exchange. And they take a curve, as `increase,curve=cosine`: steps (the default, the falls),
cosine, linear, polynomial, exponential, inverse_sqrt, wsd, with a batch of at most 5 120.

The data: TFDS's `cifar10` as ArrayRecord files, see README.md; `data.dir=FOLDER` says where.
"""

from ml_collections import ConfigDict

from bigbatch.config import base_config, from_argument

PRESETS = {
    "decay": {"strategy": "decay"},
    "hybrid": {"strategy": "hybrid", "hybrid_falls": 1},
    "increase": {"strategy": "increase"},
    "figure5_original": {"strategy": "decay"},
    "figure5_increasing_batch": {"strategy": "increase", "limits.max_batch_size": 5120},
    "figure5_increased_lr": {
        "strategy": "increase", "limits.max_batch_size": 5120, "scale_up.learning_rate": 5.0,
    },
    "figure5_increased_momentum": {
        "strategy": "increase", "limits.max_batch_size": 5120, "scale_up.learning_rate": 5.0,
        "scale_up.momentum": 0.98,
    },
    "ramp": {
        "strategy": "increase", "recipe.batch_size": 512, "recipe.learning_rate": 0.4,
        "ramp": ((5.0, 2.0), (10.0, 2.0)), "limits.max_batch_size": 5120,
    },
    "by_hand": {
        "strategy": "by_hand", "by_hand": ((60.0, 512), (120.0, 2048), (160.0, 4096)),
    },
}

OPTIMIZERS = {
    "momentum": {"optimizer.name": "momentum"},
    "nesterov": {"optimizer.name": "nesterov"},
    "sgd": {"optimizer.name": "sgd", "recipe.momentum": 0.0},
    # As in the paper: SGD's exchange, and both betas the same for all batches.
    "adam": {
        "optimizer.name": "adam", "recipe.learning_rate": 0.001, "exchange": "linear",
        "per_example.momentum": False, "per_example.beta2": False,
    },
    # With the defaults: Adam's exchange, and betas that keep their half-lives per example.
    "adam_by_sqrt": {
        "optimizer.name": "adam", "recipe.learning_rate": 0.001, "per_example.beta2_floor": 0.85,
    },
}
# Curves in the place of the falls. A batch that follows one grows to a tenth of the set.
CURVES = {
    "steps": {},
    "cosine": {"recipe.curve": "cosine", "limits.max_batch_size": 5120},
    "linear": {"recipe.curve": "linear", "limits.max_batch_size": 5120},
    "polynomial": {
        "recipe.curve": "polynomial", "recipe.power": 2.0, "limits.max_batch_size": 5120},
    "exponential": {"recipe.curve": "exponential", "recipe.final_share": 0.01,
                    "limits.max_batch_size": 5120},
    "inverse_sqrt": {"recipe.curve": "inverse_sqrt", "recipe.final_share": 0.05,
                     "limits.max_batch_size": 5120},
    "wsd": {"recipe.curve": "wsd", "limits.max_batch_size": 5120},
}


def get_config(argument: str = "") -> ConfigDict:
    """The config of `preset,key=value,...`; the first preset where none is named."""
    config = base_config()
    config.recipe.update({
        "learning_rate": 0.1, "batch_size": 128, "momentum": 0.9, "epochs": 204.8,
        "falls": ((60.0, 5.0), (120.0, 5.0), (160.0, 5.0)),
    })
    # The rest of the recipe is Zagoruyko & Komodakis's (2016).
    config.optimizer.weight_decay = 5e-4
    config.optimizer.weight_decay_on = "all"
    config.ghost_size = 128
    # What an accelerator takes best; the curve is the same with any other.
    config.max_per_device_batch = 640
    config.eval_batch_size = 2500
    config.model = ConfigDict({
        "ghost_size": config.get_ref("ghost_size"), "depth": 16, "width": 4, "bn_decay": 0.9,
        "dropout_rate": 0.0, "same_padding": False,
    })
    config.data.update({
        "name": "cifar10", "train_examples": 50_000, "test_examples": 10_000, "num_classes": 10,
        "image_size": 32, "mean": (125.3, 123.0, 113.9), "std": (63.0, 62.1, 66.7),
        "augment": {"pad": 4, "crop": 32, "flip": True},
    })
    return from_argument(config, argument, PRESETS, {
        "optimizer": OPTIMIZERS, "curve": CURVES})
