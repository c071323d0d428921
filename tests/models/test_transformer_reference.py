"""The transformer beside GPT-2 and Llama of `transformers`, with the same weights.

`make test-adapters` makes an environment with PyTorch and `transformers` and runs this. They need
not be in the environment of JAX: a program in theirs computes what is compared here.
"""

import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from bigbatch.models.transformer import Transformer
from tests.conftest import REPOSITORY

PROGRAM = REPOSITORY / "tests" / "support" / "torch_transformers.py"
PYTHONS = (sys.executable, REPOSITORY / ".adapters" / "bin" / "python")
LIBRARIES = "import importlib.util as i, sys; " \
    "sys.exit(not (i.find_spec('torch') and i.find_spec('transformers')))"
OPTIONS = {
    "gpt2": {"blocks": 2, "width": 24, "heads": 4, "hidden": 40, "norm": "layer", "bias": True,
             "positions": "learned", "max_length": 16, "activation": "gelu", "tied": True},
    "llama": {"blocks": 2, "width": 32, "heads": 4, "hidden": 48, "key_heads": 2,
              "rotary_base": 100.0},
}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """The program's arrays by name."""
    for python in PYTHONS:
        try:
            found = subprocess.run([python, "-c", LIBRARIES], check=False).returncode == 0
        except FileNotFoundError:
            found = False
        if found:
            break
    else:
        pytest.skip("torch and transformers are not installed; make test-adapters")
    path = tmp_path_factory.mktemp("theirs") / "arrays.npz"
    subprocess.run([python, PROGRAM, path], check=True, timeout=300)
    return dict(np.load(path))


@pytest.fixture
def float64():
    jax.config.update("jax_enable_x64", True)


def from_gpt2(weights):
    """GPT-2's arrays under this package's names. Its kernels have (inputs, outputs) too."""
    def layer(name, kind="kernel"):
        return {kind: weights[f"{name}.weight"], "bias": weights[f"{name}.bias"]}

    blocks = {}
    for number in range(2):
        own = f"transformer.h.{number}"
        joined = layer(f"{own}.attn.c_attn")  # queries, keys and values in one
        names = ("query", "key", "value")
        parts = {kind: np.split(joined[kind], 3, axis=-1) for kind in joined}
        attention = {name: {kind: parts[kind][at] for kind in parts}
                     for at, name in enumerate(names)}
        blocks[number] = {
            "attention_norm": layer(f"{own}.ln_1", "scale"),
            "attention": attention | {"output": layer(f"{own}.attn.c_proj")},
            "feed_forward_norm": layer(f"{own}.ln_2", "scale"),
            "feed_forward": {"up": layer(f"{own}.mlp.c_fc"), "down": layer(f"{own}.mlp.c_proj")},
        }
    return {
        "tokens": {"embedding": weights["transformer.wte.weight"]},
        "positions": {"embedding": weights["transformer.wpe.weight"]},
        "blocks": blocks, "norm": layer("transformer.ln_f", "scale"),
    }


def from_llama(weights):
    """Llama's arrays under this package's names. Its kernels have (outputs, inputs)."""
    def kernel(name):
        return {"kernel": weights[f"{name}.weight"].T}

    def scale(name):
        return {"scale": weights[f"{name}.weight"]}

    blocks = {}
    for number in range(2):
        own = f"model.layers.{number}"
        blocks[number] = {
            "attention_norm": scale(f"{own}.input_layernorm"),
            "attention": {
                name: kernel(f"{own}.self_attn.{theirs}_proj")
                for name, theirs in zip(("query", "key", "value", "output"), "qkvo", strict=True)},
            "feed_forward_norm": scale(f"{own}.post_attention_layernorm"),
            "feed_forward": {name: kernel(f"{own}.mlp.{name}_proj")
                             for name in ("gate", "up", "down")},
        }
    return {"tokens": {"embedding": weights["model.embed_tokens.weight"]}, "blocks": blocks,
            "norm": scale("model.norm"), "head": kernel("lm_head")}


FROM = {"gpt2": from_gpt2, "llama": from_llama}


def converted(theirs, name, kind, dtype):
    """Their weights, gradient or updated weights as a tree of this package's."""
    start = f"{name}/{kind}/"
    arrays = {key.removeprefix(start): value.astype(dtype) for key, value in theirs.items()
              if key.startswith(start)}
    tree = FROM[name](arrays)
    assert sum(x.size for x in jax.tree.leaves(tree)) == sum(x.size for x in arrays.values())
    return tree


def of_parameters(name, dtype):
    """Logits as a function of parameters and tokens."""
    graph, state = nnx.split(nnx.eval_shape(
        lambda: Transformer(31, jnp.dtype(dtype), nnx.Rngs(0), **OPTIONS[name])))

    def run(params, tokens):
        filled = jax.tree.map(lambda leaf: leaf, state)
        nnx.replace_by_pure_dict(filled, params)
        return nnx.merge(graph, filled, copy=True)(tokens, False, None)

    return run


@pytest.mark.parametrize("name", OPTIONS)
def test_logits_gradient_and_an_update_are_theirs_in_float64(name, theirs, float64):
    """Llama with PyTorch's own RMSNorm and with angles in float64, since its own are in float32."""
    params = converted(theirs, name, "weights", np.float64)
    tokens, run = jnp.asarray(theirs["tokens"]), of_parameters(name, "float64")

    @jax.jit
    def update(params):
        def loss(params):
            logits = run(params, tokens)
            found = jax.nn.log_softmax(logits[:, :-1])
            return -jnp.take_along_axis(found, tokens[:, 1:, None], axis=-1).mean(), logits

        (value, logits), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        adam = optax.adamw(1e-2, weight_decay=0.1)
        steps, _ = adam.update(gradient, adam.init(params), params)
        return logits, value, gradient, optax.apply_updates(params, steps)

    logits, value, gradient, updated = update(params)
    close = partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-10)
    assert np.std(logits) > 0.2
    close(logits, theirs[f"{name}/logits"])
    close(value, theirs[f"{name}/loss"])
    jax.tree.map(close, gradient, converted(theirs, name, "gradient", np.float64))
    jax.tree.map(close, updated, converted(theirs, name, "updated", np.float64))


@pytest.mark.parametrize("name", OPTIONS)
def test_logits_are_theirs_in_float32(name, theirs):
    """The networks as `transformers` has them, nothing replaced."""
    params = converted(theirs, name, "weights", np.float32)
    logits = jax.jit(of_parameters(name, "float32"))(params, jnp.asarray(theirs["tokens"]))
    np.testing.assert_allclose(logits, theirs[f"{name}/float32/logits"], rtol=2e-5, atol=2e-5)
