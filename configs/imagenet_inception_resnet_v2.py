"""ImageNet with Inception-ResNet-V2 in 2 500 updates: Figures 6 and 7 of the paper.

    python -m bigbatch.main --config=configs/imagenet_inception_resnet_v2.py:figure7_momentum_0.9 \
        --config.data.dir=DIR --workdir=RUN

90 epochs at rate 3 without a warm-up; the noise scale is divided by 10 at epochs 30, 60 and 80.
Accuracies are the paper's, two runs each where it gives two. It does not say on what hardware;
8192 in ghost batches of 64 fill 128 devices.

| preset | figure | batch | momentum | updates | validation accuracy |
|---|---|---|---|---|---|
| figure6_decay | 6, "decaying" | 8192 | 0.9 | 14 076 | .787, .778 |
| figure6_increase | 6, "increasing" | 8192, 81 920 | 0.9 | 5 631 | .781, .768 |
| figure7_momentum_0.9 | 7 | 8192, 65 536 | 0.9 | 5 865 | .788 |
| figure7_momentum_0.95 | 7 | 16 384, 65 536 | 0.95 | 3 519 | .781, .778 |
| figure7_momentum_0.975 | 7 | 32 768, 65 536 | 0.975 | 2 346 | .775, .768 |

Ghost batches are of 32 in Figure 6, of 64 in Figure 7. The paper does not give weight decay, label
smoothing, dropout, auxiliary head and crop of these runs. These are tf-slim's here: weight decay
4e-5 but not on BN's bias, no label smoothing, dropout 0.2, the auxiliary head's loss at 0.4, BN's
decay 0.9997 a ghost batch and no scale, Inception's crop, inputs in [-1, 1], tested on the central
87.5 % of each side. tf-slim also distorts colours, which is not done here.

`smoke=true` keeps the phases and shrinks everything else: a sixteenth of the widths, one block of
each kind, 80x80 images, batches a 512th, 9 epochs of 400 photographs. About a minute on two CPU
cores.

The data: TFDS's `imagenet2012` as ArrayRecord files, see README.md.
"""

from typing import Any

from ml_collections import ConfigDict

from bigbatch.config import base_config, from_argument

FIGURE_7 = {"strategy": "increase", "limits.max_batch_size": 65_536, "ghost_size": 64}
PRESETS = {
    "figure6_decay": {"strategy": "decay"},
    "figure6_increase": {"strategy": "hybrid", "hybrid_falls": 1},
    "figure7_momentum_0.9": FIGURE_7,
    "figure7_momentum_0.95": FIGURE_7 | {"scale_up.momentum": 0.95},
    "figure7_momentum_0.975": FIGURE_7 | {"scale_up.momentum": 0.975},
}


def smoke(config: ConfigDict) -> dict[str, Any]:
    """The settings that make a preset small."""
    limit = config.limits.max_batch_size
    return {
        "dtype": "float32", "ghost_size": 8, "model.divisor": 16, "model.blocks": (1, 1, 1),
        "model.auxiliary_weight": 0.0, "model.bn_decay": 0.9,
        "recipe.batch_size": config.recipe.batch_size // 512,
        "limits.max_batch_size": limit and limit // 512,
        "recipe.learning_rate": 0.05, "recipe.epochs": 9.0,
        "recipe.falls": ((3.0, 10.0), (6.0, 10.0), (8.0, 10.0)),
        "data.train_split": "train[:400]", "data.train_examples": 400,
        "data.test_split": "validation[:100]", "data.test_examples": 100,
        "data.image_size": 80, "data.workers": 0,
        "eval_batch_size": 25, "max_per_device_batch": 16,
    }


def get_config(argument: str = "") -> ConfigDict:
    """The config of `preset,key=value,...`; the first preset where none is named."""
    config = base_config()
    config.recipe.update({
        "learning_rate": 3.0, "batch_size": 8192, "momentum": 0.9, "epochs": 90.0,
        "falls": ((30.0, 10.0), (60.0, 10.0), (80.0, 10.0)),
    })
    config.optimizer.update({
        "name": "momentum", "weight_decay": 4e-5, "weight_decay_on": "no_norms",
    })
    config.dtype = "bfloat16"
    config.ghost_size = 32
    config.network = "bigbatch.models.inception_resnet_v2.InceptionResNetV2"
    config.model = ConfigDict({
        "ghost_size": config.get_ref("ghost_size"), "bn_decay": 0.9997, "bn_scale": False,
        "dropout_rate": 0.2, "auxiliary_weight": 0.4, "blocks": (10, 20, 10), "divisor": 1,
        "image_size": config.data.get_ref("image_size"),
    })
    config.max_per_device_batch = 64
    config.data.update({
        "name": "imagenet2012", "train_split": "train", "test_split": "validation",
        "train_examples": 1_281_167, "test_examples": 50_000, "num_classes": 1000,
        "image_size": 299, "mean": (127.5, 127.5, 127.5), "std": (127.5, 127.5, 127.5),
        "streaming": True, "crop_style": "inception", "eval_share": 0.875,
        "resample": "bicubic", "workers": 6, "read_threads": 2,
        "augment": {"pad": 0, "crop": 0, "flip": True},
    })
    config.log_every_epochs = 0.05
    config.checkpoint_every_epochs = 2.0
    config.eval_batch_size = 125
    return from_argument(config, argument, PRESETS, {"smoke": {"true": smoke, "false": {}}})
