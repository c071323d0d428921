"""The transformer against one that is written here head by head, and what it is asked besides."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from bigbatch.mistake import Mistake
from bigbatch.models.attention import attend, rotary_angles, rotate
from bigbatch.models.transformer import Transformer
from bigbatch.update import dependence_rules, independence, noise
from tests.support.network_checks import count, keys, random_state

VOCABULARY, EXAMPLES, LENGTH = 13, 3, 9
SMALL = {"blocks": 2, "width": 24, "heads": 4, "hidden": 20}
GPT = {"norm": "layer", "positions": "learned", "activation": "gelu", "bias": True, "tied": True,
       "max_length": 11}
KINDS = {
    "llama": {"key_heads": 2, "rotary_base": 50.0},
    "gpt": GPT,
    "between": {"norm": "layer", "key_heads": 1, "tied": True, "activation": "gelu"},
    "rms_with_biases": {"bias": True, "positions": "learned", "max_length": LENGTH},
}
TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (EXAMPLES, LENGTH), dtype=np.int32)


def abstract(dtype="float32", vocabulary=VOCABULARY, **options):
    return nnx.eval_shape(
        lambda: Transformer(vocabulary, jnp.dtype(dtype), nnx.Rngs(0), **SMALL | options))


def of_parameters(dtype="float32", **options):
    """The network as (a function of its parameters, tokens, train and keys, its parameters)."""
    graph, state = nnx.split(random_state(abstract(dtype, **options)))

    def run(params, tokens=TOKENS, train=False, keys_B=None):
        filled = jax.tree.map(lambda leaf: leaf, state)
        nnx.replace_by_pure_dict(filled, params)
        return nnx.merge(graph, filled, copy=True)(jnp.asarray(tokens), train, keys_B)

    return run, nnx.to_pure_dict(state)


@pytest.fixture
def float64():
    jax.config.update("jax_enable_x64", True)


# --- an independent transformer ------------------------------------------------------------------
def normalise(x, norm, kind):
    if kind == "layer":
        x = x - x.mean(axis=-1, keepdims=True)
    x = x / jnp.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-5) * norm["scale"]
    return x + norm.get("bias", 0.0)


def dense(x, layer):
    return x @ layer["kernel"] + layer.get("bias", 0.0)


def turn(x_TxH, base):
    """Rotary positions as a product of complex numbers."""
    half = x_TxH.shape[-1] // 2
    z = x_TxH[:, :half] + 1j * x_TxH[:, half:]
    z = z * np.exp(1j * np.outer(np.arange(len(x_TxH)), base ** (-np.arange(half) / half)))
    return jnp.concatenate([z.real, z.imag], axis=-1)


def attention(x_TxD, layers, options):
    heads = SMALL["heads"]
    size, group = SMALL["width"] // heads, heads // options.get("key_heads", heads)
    query, key, value = (dense(x_TxD, layers[name]) for name in ("query", "key", "value"))
    results = []
    for head in range(heads):
        q = query[:, head * size :][:, :size]
        k, v = (y[:, head // group * size :][:, :size] for y in (key, value))
        if options.get("positions") != "learned":
            q, k = (turn(y, options.get("rotary_base", 10_000.0)) for y in (q, k))
        weights = jnp.exp(q @ k.T / size**0.5) * np.tri(len(x_TxD))
        results.append(weights @ v / weights.sum(axis=1, keepdims=True))
    return dense(jnp.concatenate(results, axis=-1), layers["output"])


def feed_forward(x, layers, options):
    y = dense(x, layers["up"])
    if options.get("activation") == "gelu":
        y = y * (1 + jnp.tanh((2 / np.pi) ** 0.5 * (y + 0.044715 * y**3))) / 2
    else:
        gate = dense(x, layers["gate"])
        y = y * gate / (1 + jnp.exp(-gate))
    return dense(y, layers["down"])


def reference(params, options):
    """Logits of TOKENS, each example for itself."""
    kind = options.get("norm", "rms")

    def one_example(tokens_T):
        x = params["tokens"]["embedding"][tokens_T]
        if options.get("positions") == "learned":
            x = x + params["positions"]["embedding"][:LENGTH]
        for block in params["blocks"].values():
            x = x + attention(normalise(x, block["attention_norm"], kind), block["attention"],
                              options)
            x = x + feed_forward(normalise(x, block["feed_forward_norm"], kind),
                                 block["feed_forward"], options)
        x = normalise(x, params["norm"], kind)
        tied = options.get("tied", False)
        return x @ (params["tokens"]["embedding"].T if tied else params["head"]["kernel"])

    return jax.vmap(one_example)(TOKENS)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_an_independent_transformer(kind, float64):
    run, params = of_parameters("float64", **KINDS[kind])
    found = jax.jit(run)(params)
    expected = jax.jit(lambda params: reference(params, KINDS[kind]))(params)
    assert found.dtype == jnp.float64 and found.std() > 0.5
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10)


def cross_entropy(logits_BxTxV, tokens_BxT):
    """Of the next token, averaged over all that have one."""
    logits = jax.nn.log_softmax(logits_BxTxV[:, :-1])
    return -jnp.take_along_axis(logits, tokens_BxT[:, 1:, None], axis=-1).mean()


@pytest.mark.parametrize("kind", ["llama", "gpt"])
@pytest.mark.parametrize("recomputed", [False, True])
def test_an_update_equals_that_of_the_independent_one(kind, recomputed, float64):
    """Flax's Optimizer with Optax's AdamW, beside Optax on plain arrays.

    And the slopes of copies of the norms, one for each example, are the examples' own gradients.
    """
    run, params = of_parameters("float64", **KINDS[kind])
    expected_loss, gradient = jax.jit(jax.value_and_grad(
        lambda params: cross_entropy(reference(params, KINDS[kind]), TOKENS)))(params)
    adam = optax.adamw(1e-2, weight_decay=0.1)
    steps, _ = adam.update(gradient, adam.init(params), params)
    expected = optax.apply_updates(params, steps)

    module = abstract("float64", checkpoint_blocks=recomputed, **KINDS[kind])
    graph, state = nnx.split(module)
    nnx.replace_by_pure_dict(state, params)
    module = nnx.merge(graph, state)
    optimizer = nnx.Optimizer(module, adam, wrt=nnx.Param)

    @nnx.jit
    def update(module, optimizer):
        loss, gradient = nnx.value_and_grad(
            lambda module: cross_entropy(module(jnp.asarray(TOKENS), True, keys(EXAMPLES)), TOKENS)
        )(module)
        optimizer.update(module, gradient)
        return loss, gradient

    loss, found = update(module, optimizer)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-12)
    close = partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-10)
    jax.tree.map(close, nnx.to_pure_dict(found), gradient)
    jax.tree.map(close, nnx.to_pure_dict(nnx.state(module)), expected)

    run, _ = of_parameters("float64", checkpoint_blocks=recomputed, **KINDS[kind])
    copied = jax.tree_util.tree_map_with_path(
        lambda path, _: any("norm" in str(key) for key in path), params)
    slopes = jax.jit(jax.grad(lambda params: cross_entropy(
        run(params, train=True, keys_B=keys(EXAMPLES)), TOKENS)))(
            noise.with_copies(params, copied, EXAMPLES))
    alone = jax.jit(jax.jacrev(lambda params: jax.vmap(cross_entropy)(
        reference(params, KINDS[kind])[:, None], TOKENS[:, None]) / EXAMPLES))(params)
    for one, other in zip(noise.only(slopes, copied), noise.only(alone, copied), strict=True):
        close(one, other)


# --- attention -----------------------------------------------------------------------------------
def test_the_library_attention_is_the_one_that_is_written_out(float64):
    """In float32 the library's is taken, in float64 the other; both with groups of heads."""
    random = np.random.default_rng(1)
    query, key, value = (random.normal(size=(2, 17, heads, 8)) for heads in (6, 2, 2))
    found = attend(*(jnp.float32(x) for x in (query, key, value)))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, attend(query, key, value), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_changes_no_logits_before_it(kind):
    run, params = of_parameters(**KINDS[kind])
    run = jax.jit(run)
    before = run(params)
    for t in range(LENGTH):
        tokens = TOKENS.copy()
        tokens[:, t] = (tokens[:, t] + 1) % VOCABULARY
        after = run(params, tokens)
        np.testing.assert_array_equal(after[:, :t], before[:, :t])
        assert (np.abs(after[:, t:] - before[:, t:]).max(axis=-1) > 1e-4).all()


def test_rotary_products_depend_on_the_distance_of_two_tokens(float64):
    query, key = np.random.default_rng(2).normal(size=(2, 8))
    angles = rotary_angles(20, 8, 100.0, jnp.float64)
    turned = [rotate(jnp.tile(x, (1, 20, 1, 1)), angles)[0, :, 0] for x in (query, key)]
    products = turned[0] @ turned[1].T
    np.testing.assert_allclose(products[0, 0], query @ key, rtol=1e-12)
    for distance in range(-19, 20):
        along = np.diagonal(products, distance)
        np.testing.assert_allclose(along, along[0], rtol=1e-10)
        assert distance == 0 or abs(along[0] - query @ key) > 1e-3


# --- types, recomputation, dropout ---------------------------------------------------------------
@pytest.mark.parametrize("kind", ["llama", "gpt"])
def test_bfloat16_computes_and_float32_keeps(kind):
    short, params = of_parameters("bfloat16", **KINDS[kind])
    full, _ = of_parameters("float32", **KINDS[kind])
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    found, expected = jax.jit(short)(params), jax.jit(full)(params)
    assert found.dtype == expected.dtype == jnp.float32
    error = np.sqrt(np.mean((found - expected) ** 2)) / expected.std()
    assert 1e-4 < error < 0.03, f"bfloat16 is off by {error:.4f} of the logits' deviation"

    def loss(params):
        return cross_entropy(short(params, train=True, keys_B=keys(EXAMPLES)), TOKENS)

    gradient = jax.jit(jax.grad(loss))(params)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype("float32")}
    equations = list(_equations(jax.make_jaxpr(jax.grad(loss))(params).jaxpr))
    # With a precision that is stated the compiler makes them bfloat16: attention's and the head's.
    factors = {str(atom.aval.dtype) for one in equations for atom in one.invars
               if one.primitive.name == "dot_general" and one.params["precision"] is None}
    assert factors == {"bfloat16"}
    sums = {str(one.outvars[0].aval.dtype) for one in equations
            if one.primitive.name == "scatter-add" and one.outvars[0].aval.ndim == 2}
    assert sums == {"float32"}, "a token's gradients are added up in another type"


def _equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _equations(inner)


@pytest.mark.parametrize("kind", ["llama", "gpt"])
def test_recomputed_blocks_give_the_same_gradients(kind, float64):
    found = []
    for recomputed in (False, True):
        run, params = of_parameters("float64", dropout_rate=0.3, checkpoint_blocks=recomputed,
                                    **KINDS[kind])

        def loss(params, run=run):
            return cross_entropy(run(params, train=True, keys_B=keys(EXAMPLES)), TOKENS)

        names = [equation.primitive.name for equation in jax.make_jaxpr(loss)(params).eqns]
        assert len([name for name in names if "remat" in name or name == "checkpoint"]) == (
            SMALL["blocks"] if recomputed else 0)
        found.append(jax.jit(jax.value_and_grad(loss))(params))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-12), *found)


def test_dropout_follows_the_keys_of_the_examples_and_nothing_else():
    run, params = of_parameters(dropout_rate=0.4)
    run = jax.jit(run, static_argnames="train")
    drawn = keys(EXAMPLES, seed=5)
    whole = run(params, TOKENS, True, drawn)
    order = np.array([2, 0, 1])
    np.testing.assert_allclose(run(params, TOKENS[order], True, drawn[order]), whole[order],
                               rtol=1e-5, atol=1e-5)
    one = run(params, TOKENS[1:2], True, drawn[1:2])
    np.testing.assert_allclose(one, whole[1:2], rtol=1e-5, atol=1e-5)
    assert np.abs(run(params, TOKENS, True, keys(EXAMPLES, seed=6)) - whole).max() > 0.1
    np.testing.assert_array_equal(run(params, TOKENS, False, drawn), run(params, TOKENS))
    same = run(params, np.stack([TOKENS[0]] * 2), True, drawn[:2])
    assert np.abs(same[0] - same[1]).max() > 0.1


def test_at_rate_0_training_is_evaluation():
    run, params = of_parameters()
    np.testing.assert_array_equal(run(params, train=True, keys_B=keys(EXAMPLES)), run(params))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recomputed", [False, True])
def test_examples_are_kept_apart_by_operations_that_the_check_knows(kind, recomputed, monkeypatch):
    unknown = []
    monkeypatch.setattr(dependence_rules, "unknown", lambda equation, _: unknown.append(equation))
    run, params = of_parameters(dropout_rate=0.1, checkpoint_blocks=recomputed, **KINDS[kind])
    shape, found = independence.trace(
        lambda params, _, tokens, keys_B: run(params, tokens, True, keys_B), params, {},
        jax.ShapeDtypeStruct((4, LENGTH), jnp.int32), jax.eval_shape(lambda: keys(4)))
    assert independence.is_apart(found, shape.shape)
    np.testing.assert_array_equal(found.along[0] | found.everywhere, [1, 1, 2, 2])
    assert unknown == []


# --- its parameters ------------------------------------------------------------------------------
GPT_124M = {"blocks": 12, "width": 768, "heads": 12, "hidden": 3072} | GPT | {"max_length": 1024}
LLAMA_1B = {"blocks": 24, "width": 2048, "heads": 16, "hidden": 5504}


def test_parameters_of_gpt_2_and_of_a_llama_are_as_many_as_published():
    gpt = abstract("bfloat16", 50_257, **GPT_124M)
    d = 768
    assert count(gpt) == 124_439_808 == (50_257 + 1024) * d + 12 * (
        12 * d * d + 13 * d) + 2 * d  # 4 + 8 D² of kernels, 9 D of biases and 4 D of norms a block
    llama = abstract("bfloat16", 32_000, **LLAMA_1B)
    assert count(llama) == 1_345_423_360 == 2 * 32_000 * 2048 + 24 * (
        4 * 2048**2 + 3 * 2048 * 5504 + 2 * 2048) + 2048
    grouped = abstract("bfloat16", 32_000, **LLAMA_1B | {"key_heads": 4})
    assert count(llama) - count(grouped) == 24 * 2 * 2048 * (16 - 4) * 128


def test_parameters_have_names_by_block_and_begin_as_gpt_2s():
    options = {"width": 96, "hidden": 160, "blocks": 3, **GPT}
    module = abstract("bfloat16", **options)
    begin = jax.jit(lambda: nnx.state(
        Transformer(VOCABULARY, jnp.bfloat16, nnx.Rngs(0), **SMALL | options)))
    found = {"/".join(map(str, path)): np.asarray(leaf[...])
             for path, leaf in nnx.to_flat_state(begin())}
    layers = ["attention/query", "attention/key", "attention/value", "attention/output",
              "feed_forward/up", "feed_forward/down", "attention_norm", "feed_forward_norm"]
    expected = {"tokens/embedding", "positions/embedding", "norm/scale", "norm/bias"} | {
        f"blocks/{block}/{layer}/{kind}" for block in range(3) for layer in layers
        for kind in ("bias", "scale" if "norm" in layer else "kernel")}
    assert found.keys() == expected
    for name, values in found.items():
        assert values.dtype == np.float32
        if name.endswith(("bias", "scale")):
            np.testing.assert_array_equal(values, float(name.endswith("scale")))
            continue
        deviation = 0.02 / (6**0.5 if "output" in name or "down" in name else 1)
        error = 5 / np.sqrt(2 * values.size)  # 5 standard errors
        np.testing.assert_allclose(values.std() / deviation, 1, atol=error, err_msg=name)
    kinds = {type(part).__name__ for path, part in nnx.iter_modules(module) if "norm" in str(path)}
    assert kinds == {"LayerNorm"}
    llama = abstract("bfloat16")
    names = {path[-1] for path, _ in nnx.to_flat_state(nnx.state(llama))}
    assert names == {"embedding", "kernel", "scale"}
    assert type(llama.norm).__name__ == "RMSNorm"


# --- refusals ------------------------------------------------------------------------------------
@pytest.mark.parametrize(("options", "message"), [
    ({"heads": 5}, "model.heads is 5; it must divide model.width, which is 24"),
    ({"key_heads": 3}, "model.key_heads is 3; it must divide model.heads, which is 4"),
    ({"heads": 8}, "model.width / model.heads is 3; rotary positions turn pairs .* must be even"),
    ({"blocks": 0}, "model.blocks is 0; it must be a whole number, 1 or more"),
    ({"hidden": 8.5}, "model.hidden is 8.5; it must be a whole number"),
    ({"max_length": 0}, "model.max_length is 0; it must be a whole number"),
    ({"vocabulary": 0}, "The vocabulary is 0; it must be 1 or more"),
    ({"norm": "batch"}, "model.norm is 'batch'; it must be rms or layer"),
    ({"positions": "alibi"}, "model.positions is 'alibi'; it must be rotary or learned"),
    ({"activation": "relu"}, "model.activation is 'relu'; it must be swiglu or gelu"),
    ({"attention": "flash"}, "model.attention is 'flash'; it must be xla or cudnn"),
    ({"positions": "learned"}, "model.max_length is None; learned positions need the longest"),
    ({"attention": "cudnn"}, "is 'cudnn', .* config.dtype is float32; set model.attention='xla'"),
])
def test_a_network_that_cannot_be_is_refused(options, message):
    with pytest.raises(Mistake, match=message) as refused:
        abstract(**options)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("options", "shape", "dtype", "message"), [
    (GPT, (2, 12), "int32", "model.max_length is 11, but the sequences have 12 tokens"),
    ({"max_length": 8}, (2, 9), "int32", "model.max_length is 8, but the sequences have 9 tokens"),
    ({}, (2, 9), "float32", r"got float32 of shape \(2, 9\); it takes whole numbers of shape"),
    ({}, (2, 8, 8, 1), "int32", r"got int32 of shape \(2, 8, 8, 1\); it takes whole numbers"),
    ({"dropout_rate": 1.0}, (2, 9), "int32", r"dropout: rate is 1.0; it must lie in \[0, 1\)"),
])
def test_inputs_that_do_not_fit_are_refused(options, shape, dtype, message):
    run, params = of_parameters(**options)
    with pytest.raises(Mistake, match=message):
        run(params, np.zeros(shape, dtype), True, keys(2))


def test_cudnn_where_there_is_none_is_refused_in_a_line():
    run, params = of_parameters("bfloat16", attention="cudnn")
    with pytest.raises(Mistake, match="model.attention is 'cudnn', but JAX says: .*'xla' runs"):
        run(params)
