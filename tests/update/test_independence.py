"""What the check of independence follows of a language model: tokens, heads, recomputed blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from bigbatch.update import dependence_rules, independence
from bigbatch.update.dependence import Dependence

EXAMPLES, LENGTH, VOCABULARY, WIDTH = 4, 16, 11, 128
PARAMS = {
    "table": jax.ShapeDtypeStruct((VOCABULARY, WIDTH), jnp.bfloat16),
    "turn": jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.bfloat16),
}


@pytest.fixture
def unknown(monkeypatch):
    """The names of operations that were met and have no rule."""
    met = []
    plain = dependence_rules.unknown
    monkeypatch.setattr(dependence_rules, "unknown", lambda equation, operands: (
        met.append(equation.primitive.name) or plain(equation, operands)))
    return met


def keeps_apart(function):
    """Whether `function(params, tokens_BxT)` was not seen to mix two ghost batches of tokens."""
    def call(params, batch_stats, tokens, keys):
        return function(params, tokens)

    tokens = jax.ShapeDtypeStruct((EXAMPLES, LENGTH), jnp.int32)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), EXAMPLES))
    shape, found = independence.trace(call, PARAMS, {}, tokens, keys)
    return independence.is_apart(found, shape.shape)


def embedded(params, tokens):
    return jnp.take(params["table"], tokens, axis=0)


def halves(x):
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([-second, first], axis=-1)


def complex_numbers(x):
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    z = (first + 1j * second) * jnp.exp(1j * jnp.arange(LENGTH))[:, None]
    return jnp.concatenate([z.real, z.imag], axis=-1)


def heads(x):
    return x.reshape(*x.shape[:2], 2, -1)


def attended(x, **options):
    return jax.nn.dot_product_attention(heads(x), heads(x)[:, :, :1], heads(x)[:, :, :1], **options)


# What a model does with its embedded tokens, example by example.
APART = {
    "embedding": lambda x: x,
    "rotated": halves,
    "rotated_as_complex_numbers": complex_numbers,
    "rotated_pair_by_pair": lambda x: jnp.stack(
        [-x[..., 1::2], x[..., ::2]], axis=-1).reshape(x.shape),
    "scaled": lambda x: x * jnp.linspace(0.5, 1, WIDTH).reshape(1, 1, WIDTH),
    "attention": attended,
    "causal": lambda x: attended(x, is_causal=True),
    "recomputed": jax.checkpoint(lambda x: jnp.sin(x) * x),
    "behind_a_barrier": lambda x: sum(jax.lax.optimization_barrier((x, x + 1))),
    "cut_along_the_examples": lambda x: jnp.concatenate(jnp.split(x, 2, axis=0), axis=0),
    "ghost_by_ghost": lambda x: jnp.stack(
        [half - half.mean(axis=0) for half in jnp.split(x, 2, axis=0)]).reshape(x.shape),
}


@pytest.mark.parametrize("name", APART)
def test_what_looks_at_one_example_is_taken_and_known(name, unknown):
    assert keeps_apart(lambda params, tokens: APART[name](embedded(params, tokens)))
    assert unknown == []


@pytest.mark.parametrize("name", APART)
def test_what_mixes_examples_is_seen_through_it(name):
    """Before the operation and after it, so that no rule loses what its inputs depend on."""
    def after(params, tokens):
        y = APART[name](embedded(params, tokens))
        return y - y.mean(axis=0)

    def before(params, tokens):
        x = embedded(params, tokens)
        return APART[name](x - x.mean(axis=0))

    assert not keeps_apart(after)
    assert not keeps_apart(before)


MIXING = {
    "tokens": lambda params, tokens: embedded(params, jnp.maximum(tokens, tokens[::-1])),
    "a_neighbours_tokens": lambda params, tokens: embedded(params, tokens[::-1]),
    "counts": lambda params, tokens: params["table"][tokens - tokens.max(axis=0)],
    "over_examples": lambda params, tokens: attended(
        embedded(params, tokens).swapaxes(0, 1)).swapaxes(0, 1),
    "stacked": lambda params, tokens: jnp.stack(
        [embedded(params, tokens), embedded(params, tokens)[::-1]], axis=1).mean(axis=1),
    "halves": lambda params, tokens: sum(jnp.split(embedded(params, tokens), 2, axis=0)),
    "along_an_axis": lambda params, tokens: jnp.take_along_axis(
        embedded(params, tokens), tokens[::-1, :, None], axis=2),
}


@pytest.mark.parametrize("name", MIXING)
def test_what_mixes_the_tokens_of_examples_is_seen(name):
    assert not keeps_apart(MIXING[name])


@pytest.mark.parametrize("mixes", [False, True])
def test_cudnn_attention_is_known(mixes, unknown, monkeypatch):
    """Traced as on a machine with such a GPU; nothing is lowered."""
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda capability: True)

    def function(params, tokens):
        x = embedded(params, tokens)
        x = x - x.mean(axis=0) if mixes else x
        return attended(x, is_causal=True, implementation="cudnn")

    assert keeps_apart(function) != mixes
    assert unknown == []


def test_the_pieces_of_a_split_have_their_own_part_of_the_axis():
    traced = jax.make_jaxpr(lambda x: jnp.split(x, [1, 3], axis=1))(jnp.zeros((2, 4)))
    bits = np.array([1, 2, 2, 1], np.uint8)
    found = independence.follow(traced.jaxpr, [Dependence(0, {1: bits})])
    assert [list(one.along[1]) for one in found] == [[1], [2, 2], [1]]
