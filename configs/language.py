"""Language models: bytes of Python's standard library, GPT-2 small, a Llama of 1.3 billion.

    python -m bigbatch.main --config=configs/language.py:bytes,strategy=increase --workdir=DIR

AdamW with decoupled weight decay, a warm-up, and a cosine to 5 % of the peak. The batch grows by
Adam's exchange (the rate by the square root of its growth), and betas and decay are kept per
example. `strategy=decay` and `hybrid` are the others, `exchange=linear` or `none` other rules, and
`curve=wsd` is a stable rate with a tail of a fifth.

| preset | parameters | tokens | updates | of decay | hardware |
|---|---|---|---|---|---|
| bytes | 133 440 | 2.1e6 | 2 792 | 4 096 | 2 cores of a CPU, two minutes |
| gpt_124m | 124 439 808 | 1e10 | 13 322 | 19 074 | an accelerator; not trained |
| llama_1b | 1 345 423 360 | 2.6e10 | 8 660 | 12 398 | a slice or a host; not trained |

`bytes` has its data, 49 152 sequences of 64 bytes, of which a run takes two thirds: there is no
download. The other two read token files, train.bin and test.bin in --config.data.dir, of GPT-2's
vocabulary and of one of 32 000 (docs/language.md). docs/reproduce.md has the losses of `bytes`.
"""

from ml_collections import ConfigDict

from bigbatch.config import base_config, from_argument

LLAMA = {"norm": "rms", "positions": "rotary", "activation": "swiglu"}
GPT_2 = {"norm": "layer", "positions": "learned", "activation": "gelu", "bias": True, "tied": True}
MODELS = {
    "bytes": LLAMA | {"blocks": 2, "width": 64, "heads": 4, "hidden": 176},
    "gpt_124m": GPT_2 | {
        "blocks": 12, "width": 768, "heads": 12, "hidden": 3072, "max_length": 1024,
        "attention": "splash"},
    "llama_1b": LLAMA | {
        "blocks": 24, "width": 2048, "heads": 16, "hidden": 5504, "checkpoint_blocks": True,
        "attention": "splash"},
}
PRESETS = {
    "bytes": {},
    "gpt_124m": {
        "dtype": "bfloat16", "recipe.learning_rate": 6e-4, "recipe.batch_size": 512,
        "recipe.epochs": "1e10 tokens", "limits.max_batch_size": 2048, "ghost_size": 8,
        "optimizer.beta2": 0.95, "data.name": "tokens", "data.streaming": True,
        "data.train_split": "train", "data.test_split": "test", "data.num_classes": 50_257,
        "data.train_examples": 9_765_625, "data.test_examples": 4096,
        "data.options.length": 1024, "data.options.separator": 50_256,
        "max_per_device_batch": 16, "eval_batch_size": 16,
        "eval_every_epochs": "5e8 tokens", "checkpoint_every_epochs": "1e9 tokens",
        "log_every_epochs": "1e7 tokens",
    },
}
PRESETS["llama_1b"] = PRESETS["gpt_124m"] | {
    "recipe.learning_rate": 3e-4, "recipe.batch_size": 1024, "recipe.epochs": "2.6e10 tokens",
    "limits.max_batch_size": 4096, "data.num_classes": 32_000, "data.train_examples": 12_695_312,
    "data.options.length": 2048, "data.options.separator": 2,
    "max_per_device_batch": 8, "eval_batch_size": 8,
}
CURVES = {
    "cosine": {},
    "wsd": {"recipe.curve": "wsd", "recipe.final_share": 0.0},
}


def get_config(argument: str = "") -> ConfigDict:
    """The config of `preset,key=value,...`; the first preset where none is named."""
    config = base_config()
    config.task = "bigbatch.tasks.language"
    config.network = "bigbatch.models.transformer.Transformer"
    preset = argument.partition(",")[0]
    config.model = ConfigDict(MODELS.get(preset, MODELS["bytes"]))
    config.recipe.update({
        "learning_rate": 2e-3, "batch_size": 8, "momentum": 0.9, "epochs": "32768 examples",
        "curve": "cosine", "final_share": 0.05, "warmup_epochs": "0.05 epochs",
    })
    config.limits.max_batch_size = 128
    config.optimizer.update({
        "name": "adam", "beta2": 0.99, "decoupled": True, "weight_decay": 0.1,
        "weight_decay_on": "no_norms_or_biases",
    })
    config.per_example.beta2_floor = 0.8
    config.ghost_size = 8  # the unit in which examples are dealt to devices and passes
    config.data.update({
        "name": "stdlib", "train_split": "train[:49152]", "test_split": "test[:1024]",
        "train_examples": 49_152, "test_examples": 1024, "num_classes": 256,
    })
    config.data.options.length = 64
    config.max_per_device_batch = 128
    config.eval_batch_size = 256
    config.eval_every_epochs = "4096 examples"
    config.checkpoint_every_epochs = "16384 examples"
    config.log_every_epochs = "512 examples"
    config.tensorboard = False
    return from_argument(config, argument, PRESETS, {"curve": CURVES})
