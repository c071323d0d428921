"""A language model's update beside a plain step of Flax and Optax, and beside PyTorch's."""

import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from bigbatch.job.devices import compiler_options, make_mesh
from bigbatch.models.transformer import Transformer
from experiments.figures import load_config
from experiments.machine import own_cores
from experiments.speed import plain_transformer
from experiments.speed.bare import BareUpdate, on_gpu
from experiments.speed.measure import Measurement, beside, check_same_loss

# No separator: every token counts, as in the plain step.
SETTINGS = "data.name=experiments.speed.language.noise,data.options.separator=None"


def noise(data: ConfigDict) -> tuple[np.ndarray, np.ndarray]:
    """Sequences without meaning: no benchmark needs a data set."""
    generator, length = np.random.default_rng(0), data.options.length
    return tuple(generator.integers(0, data.num_classes, (examples, length + 1))
                 for examples in (data.train_examples, data.test_examples))


def config_of(short: bool) -> ConfigDict:
    """The preset `bytes` with an update of its middle batch; on a GPU in bfloat16 and wider."""
    if on_gpu():
        larger = "dtype=bfloat16,data.options.length=512,model.width=768,model.heads=12," \
                 "model.hidden=2048,model.blocks=6,recipe.batch_size=32"
    else:
        larger = "data.options.length=16,recipe.batch_size=8" if short else "recipe.batch_size=32"
    return load_config(
        f"configs/language.py:bytes,strategy=decay,{SETTINGS},data.train_examples=512,data.test_examples=1,"
        f"data.train_split=train,data.test_split=test,recipe.epochs=64 examples,{larger}")


def language(repeats: int, short: bool) -> list[Measurement]:
    """The update of `configs/language.py:bytes` beside both."""
    config = config_of(short)
    model, batch = config.model, config.recipe.batch_size
    ours = BareUpdate(config)
    params = jax.tree.map(jnp.array, ours.state.params)  # copies, as our update donates its own
    records = np.asarray(ours.batches[0]["examples"])[:, 0]
    tokens_BxT1 = noise(config.data)[0][records].astype(np.int32)
    setting = (f"bytes: {model.blocks} blocks, width {model.width}, batch {batch} of "
               f"{config.data.options.length} tokens, {config.dtype}")
    optimizer = (0.01, config.recipe.momentum, config.optimizer.beta2)

    module = nnx.eval_shape(lambda: Transformer(
        config.data.num_classes, jnp.dtype(config.dtype), nnx.Rngs(0), **model.to_dict()))
    init, step = plain_transformer.make_step(module, *optimizer, config.optimizer.weight_decay)
    state, tokens = init(jax.tree.map(jnp.array, params)), jnp.asarray(tokens_BxT1)
    # With the compiler options of our own programs, so that the code is compared and not XLA's.
    call = step.lower(state, tokens).compile(compiler_options(make_mesh()))

    def take_plain(updates: int = 1) -> float:
        nonlocal state
        for _ in range(updates):
            state, loss = call(state, tokens)
        jax.block_until_ready(state)
        return float(loss)

    ours.take(2)  # the loss of the second follows from the first update
    expected, tolerance = ours.loss, 0.02 if on_gpu() else 1e-4
    check_same_loss(take_plain(2), expected, tolerance)
    times = 1 if short else 5
    name = "language model: update beside a plain step of Flax and Optax"
    rows = {"plain": partial(take_plain, times), "bigbatch": partial(ours.take, times)}
    found = [beside(name, f"{setting}; equal parameters and losses", ">= 0.97", rows, repeats)]
    if not on_gpu():  # the process's own time, which other work on the machine disturbs less
        found.append(beside(f"{name}, processor time", setting, ">= 0.97", rows, repeats,
                            time.process_time))

    name = "language model: update beside PyTorch"
    try:
        from experiments.speed import torch_llama
    except ImportError:
        return [*found, Measurement(name, setting, "", "x", [],
                                    "skipped: torch is not installed in this environment")]
    sizes = {key: model[key] for key in ("blocks", "width", "heads", "hidden")}
    network = torch_llama.Llama(config.data.num_classes, config.data.options.length, **sizes)
    torch_llama.fill(network, params)
    threads = len(own_cores())
    theirs = torch_llama.Update(
        network, tokens_BxT1, optimizer[0], optimizer[1:], config.optimizer.weight_decay, threads)
    check_same_loss(theirs.take(2), expected, tolerance)
    how = "autocast, compiled" if on_gpu() else f"{threads} threads"
    return [*found, beside(
        name, f"{setting}; torch {torch_llama.torch.__version__}, {how}; equal parameters and "
        "losses", "", {"torch": partial(theirs.take, times),
                           "bigbatch": partial(ours.take, times)}, repeats)]
