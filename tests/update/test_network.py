"""Models from outside of the package: what they may be, and what is refused, naming the layer."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from bigbatch.models.dropout import dropout
from bigbatch.models.normalization import GhostBatchNorm
from bigbatch.update import dependence_rules, network
from bigbatch.update.update import init_state
from tests.support.configs import load, tiny
from tests.support.updates import conv_net, train, with_model


# --- what comes in -------------------------------------------------------------------------------
@pytest.mark.parametrize(("name", "model"), [
    ("ConvNet", {"ghost_size": 16}),
    ("Regression", {"auxiliary_weight": 0.3}),
    ("FromLinen", {"ghost_size": 16}),
])
def test_models_of_a_users_own_learn(name, model):
    config = with_model(f"support.foreign_models.{name}", model)
    net = network.build(config)
    params, batch_stats, *_ = init_state(config, net)
    images = jnp.asarray(np.random.default_rng(0).normal(size=(20, 8, 8, 1)), jnp.float32)
    logits, _ = net.apply(params, batch_stats, images, False, None)
    assert logits.shape == (20, 10)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((params, logits)))

    (*_, state), measured = train(config, 2)
    assert all(one.finite for one in measured)
    assert np.mean([one.loss for one in measured[-3:]]) < 0.8 * measured[0].loss
    moved = jax.tree.map(lambda new, old: np.abs(new - old).max(), state.params, params)
    assert min(jax.tree.leaves(moved)) > 0
    folded = jax.tree.map(lambda new, old: np.abs(new - old).max(), state.batch_stats, batch_stats)
    assert all(change > 0 for change in jax.tree.leaves(folded))
    assert len(jax.tree.leaves(folded)) == {"ConvNet": 4, "Regression": 0, "FromLinen": 2}[name]


def test_linen_and_nnx_ghost_batch_norm_are_one():
    """The same layer through Flax's bridge: rows in training, running statistics outside."""
    config = with_model("support.foreign_models.FromLinen", {"ghost_size": 16})
    net = network.build(config)
    params, batch_stats, *_ = init_state(config, net)
    images = jnp.asarray(np.random.default_rng(0).normal(size=(48, 8, 8, 1)), jnp.float32)
    _, rows = net.apply(params, batch_stats, images, True, None)
    found = rows["net"]["ToLinen_0"]["mean"]
    conv = params["net"]["Conv_0"]
    expected = jax.lax.conv_general_dilated(
        images, conv["kernel"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    ) + conv["bias"]
    np.testing.assert_allclose(
        found, expected.reshape(3, -1, 8).mean(axis=1), rtol=1e-4, atol=1e-6)
    _, after = net.apply(params, batch_stats, images, False, None)
    jax.tree.map(np.testing.assert_array_equal, after, batch_stats)


@pytest.mark.parametrize("config", [
    tiny(), conv_net(), with_model("support.foreign_models.FromLinen", {"ghost_size": 16}),
], ids=["WideResNet", "ConvNet", "FromLinen"])
def test_trees_of_a_network_fit_together(config):
    net = network.build(config)
    params, batch_stats = net.params, net.batch_stats
    assert jax.tree.structure(net.in_norm) == jax.tree.structure(params)
    assert jax.tree.structure(net.decays) == jax.tree.structure(batch_stats)
    assert set(jax.tree.leaves(net.decays)) == {config.model.get("bn_decay", 0.9)}
    marked = [leaf.size for leaf, norm in zip(
        jax.tree.leaves(params), jax.tree.leaves(net.in_norm), strict=True) if norm]
    # A scale and a bias for each mean and variance; the LayerNorm of 4x4x8 numbers has neither.
    kept = [leaf.size for leaf in jax.tree.leaves(batch_stats)]
    assert sorted(marked) == sorted(kept + [128, 128] * config.network.endswith("FromLinen"))


# --- what does not -------------------------------------------------------------------------------
class Holder(nnx.Module):
    """Softmax regression with something more in it, two levels down; `call` uses it."""

    def __init__(self, rngs, held, call=lambda held, x: x):
        self.inner = nnx.List([nnx.Linear(64, 10, rngs=rngs)])
        self.inner[0].held = held
        self.call = call

    def __call__(self, images, train, keys):
        x = self.call(self.inner[0].held, images.reshape(len(images), -1))
        return self.inner[0](x)


def holding(make, call=lambda held, x: x):
    def model(num_classes, dtype, rngs):
        return Holder(rngs, make(rngs), call)
    return model


class Inner(linen.Module):
    layer: linen.Module

    @linen.compact
    def __call__(self, x):
        return self.layer.copy(name="unfit")(x)


class LinenHolder(linen.Module):
    layer: linen.Module
    only_in_training: bool = False

    @linen.compact
    def __call__(self, images, train, keys):
        x = images.reshape(len(images), -1)
        if train or not self.only_in_training:
            x = Inner(self.layer)(x)
        return linen.Dense(10)(x)


def linen_holding(layer, **keywords):
    def model(num_classes, dtype, rngs):
        module = LinenHolder(layer, **keywords)
        rngs = nnx.Rngs(params=rngs.params(), dropout=1, noise=2)
        return nnx.bridge.ToNNX(module, rngs=rngs).lazy_init(jnp.zeros((1, 8, 8, 1)), False, None)
    return model


class Noise(linen.Module):
    @linen.compact
    def __call__(self, x):
        return x + jax.random.normal(self.make_rng("noise"), x.shape)


class Shifted(linen.Module):
    shift: np.ndarray

    def __call__(self, x):
        return x + self.shift


def adding(number):
    return lambda x: x + number


def keeping(make):
    """A model that makes a table in `__init__`, as one would in PyTorch."""
    class Model(nnx.Module):
        def __init__(self, num_classes, dtype, rngs):
            self.head = nnx.Linear(64, num_classes, rngs=rngs)
            self.table = make()

        def __call__(self, images, train, keys):
            return self.head(images.reshape(len(images), -1))
    return Model


TABLE = np.linspace(0, 1, 64)


class WithConstants(nnx.Module):
    """Constants where they may be: of the file, in `__call__`, in a function, or plain numbers."""

    def __init__(self, num_classes, dtype, rngs):
        self.head = nnx.Linear(64, num_classes, rngs=rngs)
        self.add, self.shift = adding(TABLE), (0.5, 0.25)

    def __call__(self, images, train, keys):
        x = self.add(images.reshape(len(images), -1)) * TABLE + jnp.arange(64.0)
        return self.head(x + self.shift[0])


def test_a_model_may_use_constants():
    net = network.build(with_model("update.test_network.WithConstants", {}))
    params, batch_stats = net.init(np.uint32(0))
    images = np.ones((3, 8, 8, 1), np.float32)
    logits, *_ = jax.jit(lambda *arrays: net.apply(*arrays, True, None))(
        params, batch_stats, images)
    expected = ((1 + TABLE) * TABLE + np.arange(64) + 0.5) @ params["head"]["kernel"]
    np.testing.assert_allclose(logits[0], expected, rtol=1e-4)


class Counter(nnx.Variable):
    pass


def returning(outputs):
    """A model whose `outputs` are made from its logits."""
    class Model(nnx.Module):
        def __init__(self, num_classes, dtype, rngs):
            self.head = nnx.Linear(64, num_classes, rngs=rngs)

        def __call__(self, images, train, keys):
            return outputs(self.head(images.reshape(len(images), -1)))
    return Model


def mixing(mix):
    """A model that puts its images through `mix`."""
    class Model(nnx.Module):
        def __init__(self, num_classes, dtype, rngs):
            self.conv = nnx.Conv(1, 4, (3, 3), rngs=rngs)
            self.head = nnx.Linear(256, num_classes, rngs=rngs)

        def __call__(self, images, train, keys):
            return self.head(mix(self.conv(images)).reshape(len(images), -1))
    return Model


def attention(x):
    x = x.reshape(len(x), -1)
    return jax.nn.softmax(x @ x.T) @ x


def over_layers(x):
    return jax.lax.scan(lambda x, _: (x - x.mean(axis=0), None), x, length=3)[0]


def after_a_token(x):
    tokens = x.reshape(len(x), 64, 4)
    tokens = jnp.concatenate([jnp.zeros((len(x), 1, 4)), tokens[:, 1:]], axis=1)
    return tokens - tokens.mean(axis=0)


def before_a_token(x):
    tokens = (x - x.mean(axis=0)).reshape(len(x), 64, 4)
    tokens = jnp.concatenate([jnp.zeros((len(x), 1, 4)), tokens], axis=1)
    return jnp.tile(tokens[:, 0] + tokens[:, 1], 64)


MIXING = {
    "after_a_token": after_a_token,
    "before_a_token": before_a_token,
    "taken": lambda x: jnp.take(x - x.mean(axis=0), jnp.arange(8)[::-1], axis=1),
    "taken_along": lambda x: jnp.take_along_axis(
        x - x.mean(axis=0), jnp.argsort(x, axis=3), axis=3),
    "cut_out": lambda x: jax.lax.dynamic_slice_in_dim(x - x.mean(axis=0), 0, 8, axis=1),
    "one_key": lambda x: x * jax.random.bernoulli(jax.random.key(0), 0.5, x.shape),
    "one_old_key": lambda x: jnp.where(
        jax.random.uniform(jax.random.PRNGKey(0), (len(x), 1, 1, 1)) < 0.5, x, 0.0),
    "noise": lambda x: x + jax.random.normal(jax.random.key(1), x.shape),
    "written": lambda x: (x - x.mean(axis=0)).at[:, 0].set(0.0),
    "centred": lambda x: x - x.mean(axis=0),
    "scaled": lambda x: x / jnp.linalg.norm(x),
    "batch_norm": lambda x: jax.nn.standardize(x, axis=(0, 1, 2)),
    "flat": lambda x: jax.nn.softmax(x.reshape(-1)),
    "turned": lambda x: x.T - x.T.max(axis=3, keepdims=True),
    "mixed_up": lambda x: 0.9 * x + 0.1 * x[::-1],
    "paired": lambda x: x + jnp.concatenate([x[16:], x[:16]]),
    "attention": attention,
    "sorted": lambda x: jnp.sort(x, axis=0),
    "over_layers": over_layers,
    "recomputed": jax.checkpoint(lambda x: jax.jit(lambda x: x - x.sum(axis=0))(x)),
}


class Apart(nnx.Module):
    """Much that looks at one example at a time, or at one ghost batch."""

    def __init__(self, num_classes, dtype, rngs):
        self.conv = nnx.Conv(1, 8, (3, 3), rngs=rngs)
        self.group = nnx.GroupNorm(8, num_groups=2, rngs=rngs)
        self.layer = nnx.LayerNorm(8, rngs=rngs)
        self.instance = nnx.InstanceNorm(8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.ghost = GhostBatchNorm(8, ghost_size=16, rngs=rngs)
        self.head = nnx.Linear(8, num_classes, rngs=rngs)

    def __call__(self, images, train, keys):
        x = self.instance(self.layer(self.group(self.conv(images))))
        x = nnx.max_pool(x, (2, 2), strides=(2, 2)) + nnx.avg_pool(x, (2, 2), strides=(2, 2))
        x = dropout(x, 0.3, keys, train, tag=0)
        x = x + jax.random.normal(jax.random.key(0), x.shape[1:])  # one number for all examples
        x = x @ jax.random.normal(jax.random.key(0), (8, 8))
        x = x + jax.vmap(lambda one, key: one * jax.random.normal(key, (4, 4, 1)))(x, keys)
        x = x.reshape(len(x), -1, x.shape[-1])
        x = jnp.concatenate([jnp.zeros((len(x), 1, x.shape[-1])), x[:, 1:]], axis=1)
        x = x.at[:, 0].set(1.0)[:, jnp.arange(16)[::-1]]
        x = jnp.take_along_axis(x, jnp.argsort(x, axis=1), axis=1)
        x = self.attention(x + jax.nn.one_hot(jnp.arange(16), 8))
        x = jax.lax.scan(lambda x, _: (x - x.mean(axis=1, keepdims=True), None), x, length=2)[0]
        if train:
            ghosts = x.reshape(-1, 16, *x.shape[1:])
            x = (ghosts - ghosts.mean(axis=1, keepdims=True)).reshape(x.shape)
            # Ghost batches by masks, of which the check cannot see that they keep them apart.
            ghost = jnp.arange(len(x)) // 16
            mask = (ghost[:, None] == ghost[None, :]).astype(x.dtype)
            x = x - jnp.tensordot(mask, x, axes=1) / 16
            x = x - (mask[:, :, None, None] * x[None]).sum(axis=1) / 16
        x = jnp.roll(jnp.sort(x[:, ::-1], axis=1), 1, axis=1).transpose(1, 2, 0).mean(axis=0).T
        return self.head(self.ghost(x, train))


@pytest.mark.parametrize("config", [
    with_model("update.test_network.Apart", {}), tiny(), load("imagenet_resnet50"),
    conv_net(dropout_rate=0.3), with_model("support.foreign_models.FromLinen", {"ghost_size": 16}),
], ids=["Apart", "WideResNet", "ResNet", "ConvNet", "FromLinen"])
def test_a_model_that_keeps_examples_or_ghost_batches_apart_is_taken(config, monkeypatch):
    """And each of its operations is known to the check, so that it would see one that mixes."""
    unknown = []
    monkeypatch.setattr(dependence_rules, "unknown", lambda equation, _: unknown.append(equation))
    network.build(config)
    assert unknown == []


class OneByOne(nnx.Module):
    """Calls a layer two levels down on one example."""

    def __init__(self, num_classes, dtype, rngs):
        self.inner = nnx.List([nnx.Linear(64, 10, rngs=rngs)])
        self.inner[0].norm = GhostBatchNorm(64, ghost_size=16, rngs=rngs)

    def __call__(self, images, train, keys):
        return self.inner[0](self.inner[0].norm(images.reshape(len(images), -1)[:1], train))


class Flat(linen.Module):
    @linen.compact
    def __call__(self, images, train, keys):
        return linen.Dense(10, name="head")(images.reshape(len(images), -1))


class LinenOneByOne(linen.Module):
    @linen.compact
    def __call__(self, images, train, keys):
        norm = nnx.bridge.ToLinen(GhostBatchNorm, (64,), {"ghost_size": 16}, name="norm")
        return linen.Dense(10)(norm(images.reshape(len(images), -1)[:1 + 16 * (1 - train)], train))


def from_linen(module):
    def model(num_classes, dtype, rngs):
        return nnx.bridge.ToNNX(module, rngs=rngs).lazy_init(jnp.zeros((32, 8, 8, 1)), False, None)
    return model


class Attending(nnx.Module):
    """Attention with dropout as the refusal of Flax's own advises it; and dropout at rate 0."""

    def __init__(self, num_classes, dtype, rngs):
        self.attention = nnx.MultiHeadAttention(
            2, 8, decode=False, rngs=rngs, attention_fn=nnx.dot_product_attention)
        self.dropout = nnx.Dropout(0.0, rngs=rngs)
        self.head = nnx.Linear(64, num_classes, rngs=rngs)

    def __call__(self, images, train, keys):
        def weights_dropped(x, key):
            return nnx.dot_product_attention(x, x, x, dropout_rng=key, dropout_rate=0.2)

        x = dropout(self.attention(images[..., 0]), 0.1, keys, train, tag=0)
        x = self.dropout(x, deterministic=not train)
        if train:
            x = jax.vmap(weights_dropped)(x[:, :, None], keys)
        return self.head(x.reshape(len(x), -1))


def test_attention_may_drop_out_by_the_keys_and_dropout_at_rate_0_is_harmless():
    net = network.build(with_model("update.test_network.Attending", {}))
    assert set(net.params) == {"attention", "head"}
    network.build(with_model("update.test_network.linen_dropout_of_0", {}))


linen_dropout_of_0 = linen_holding(linen.Dropout(0.0, deterministic=False))


class Frozen(nnx.Module):
    def __init__(self, num_classes, dtype, rngs):
        self.norm = GhostBatchNorm(1, ghost_size=16, rngs=rngs)

    def __call__(self, images, train, keys):
        return self.norm(images, False).reshape(len(images), -1)[:, :10]


class Uncallable(nnx.Module):
    def __init__(self, num_classes, dtype, rngs):
        pass

    def __call__(self, images):
        return images


UNFIT = {
    "nnx_batch_norm": (
        holding(lambda rngs: nnx.BatchNorm(64, rngs=rngs)),
        r"flax.nnx.BatchNorm at inner.0.held, .*GhostBatchNorm instead"),
    "nnx_dropout": (
        holding(lambda rngs: nnx.Dropout(0.5, rngs=rngs)),
        r"flax.nnx.Dropout at inner.0.held, .*models.dropout.dropout instead"),
    "linen_batch_norm": (
        linen_holding(linen.BatchNorm(use_running_average=True)),
        r"flax.linen.BatchNorm at Inner_0.unfit, .*GhostBatchNorm instead"),
    "linen_dropout": (
        linen_holding(linen.Dropout(0.5, deterministic=False), only_in_training=True),
        r"flax.linen.Dropout at Inner_0.unfit, .*models.dropout.dropout instead"),
    "linen_noise": (
        linen_holding(Noise(), only_in_training=True),
        r"draws from a random stream of Linen's; draw from the keys .*\"noise\""),
    "nnx_noise": (
        holding(lambda rngs: rngs.fork()),
        r"keeps a random stream at inner.0.held.default.count; draw from the keys"),
    "foreign_statistic": (
        holding(lambda rngs: nnx.BatchStat(jnp.zeros(3))),
        r"batch statistic at inner.0.held that is not GhostBatchNorm's"),
    "counter": (
        holding(lambda rngs: Counter(jnp.zeros(()))),
        r"keeps Counter at inner.0.held; only parameters"),
    "table": (
        holding(lambda rngs: nnx.data(jnp.arange(64.0)), lambda table, x: x + table),
        r"keeps an array at inner.0.held, which is no parameter: .*constants where they are used"),
    "made_in_init": (
        keeping(lambda: jnp.ones(64)),
        r"keeps an array at table, which is no parameter: .*where they are used: inside __call__"),
    "listed_in_init": (keeping(lambda: [jnp.ones(64)]), r"keeps an array at table\[0\], which"),
    "named_in_init": (keeping(lambda: {"a": jnp.ones(64)}), r"an array at table\['a'\], which"),
    "static": (keeping(lambda: nnx.static(jnp.ones(64))), "an array at table, which"),
    "in_a_closure": (
        keeping(lambda: adding(jnp.ones(64))), r"an array at table \(in a function, as number\)"),
    "in_a_partial": (
        keeping(lambda: partial(jnp.add, jnp.ones(64))), r"an array at table \(in a partial\)"),
    "numpy": (keeping(lambda: np.ones(64)), r"keeps a plain array at table; .*inside __call__"),
    "variable": (
        keeping(lambda: nnx.Variable(jnp.ones(64))), r"keeps Variable at table; .*inside __call__"),
    "linen_table": (
        linen_holding(Shifted(np.ones(64))), r"an array at to_nnx__module.layer.shift, which"),
    "half_parameters": (
        holding(lambda rngs: nnx.Param(jnp.zeros(3, jnp.bfloat16))),
        r"keeps bfloat16 at inner.0.held; where config.dtype is float32, .*are float32: give"),
    "another_ghost_size": (
        holding(lambda rngs: GhostBatchNorm(64, ghost_size=8, rngs=rngs)),
        r"ghost batches of 8 at inner.0.held, but config.ghost_size is 16"),
    "frozen_statistics": (
        Frozen,
        r"does not update the statistic \['norm'\]\['mean'\] in training; call GhostBatchNorm"),
    "narrow": (
        returning(lambda logits: logits[:, :9]),
        r"logits of shape \(32, 9\) for 32 images; they must be \(32, 10\)"),
    "summed": (
        returning(lambda logits: logits.sum(axis=0)), r"logits of shape \(10,\) for 32 images"),
    "three": (returning(lambda logits: (logits, [], 0)), "logits of shape tuple"),
    "bare_auxiliary": (
        returning(lambda logits: (logits, logits)),
        r"beside its logits; it must be a list of \(weight, auxiliary logits\) pairs"),
    "unweighted_auxiliary": (
        returning(lambda logits: (logits, [logits])), r"must be a list of \(weight, auxiliary"),
    "narrow_auxiliary": (
        returning(lambda logits: (logits, [(0.3, logits[:8])])), r"logits of shape \(8, 10\)"),
    **{f"mixes_{name}": (mixing(mix), r"mixes the examples of a batch at .*test_network.py:\d+, so")
       for name, mix in MIXING.items()},
    # Each entry depends on one example, of another ghost batch: no line is the first to mix them.
    "mixes_rolled": (mixing(lambda x: jnp.roll(x, 1, axis=0)), "mixes the examples of a batch, so"),
    "pairs_in_evaluation": (
        mixing(lambda x: x.reshape(-1, 2, *x.shape[1:])[:, ::-1].reshape(x.shape)),
        r"in evaluation, mixes the examples of a batch"),
    "whole_ghosts_in_evaluation": (
        mixing(lambda x: (x.reshape(-1, 16, *x.shape[1:]) * 2).reshape(x.shape)),
        r"in evaluation, fails for 2 examples: TypeError: .*any number, not whole ghost"),
    "attention_dropout": (
        holding(lambda rngs: nnx.MultiHeadAttention(2, 64, decode=False, dropout_rate=0.1,
                                                    rngs=rngs)),
        r"MultiHeadAttention at inner.0.held with dropout_rate=0.1, .* keys, train, tag\) on its"),
    "linen_attention_dropout": (
        linen_holding(linen.MultiHeadDotProductAttention(2, dropout_rate=0.1, deterministic=True)),
        r"MultiHeadDotProductAttention at Inner_0.unfit with dropout_rate=0.1, .*dropout_rate=0.0"),
    "one_by_one": (
        OneByOne, r"at inner.0.norm: GhostBatchNorm got 1 examples, .*; call it with the whole "
        r"batch, .* Called at .*test_network.py:\d+\.$"),
    "linen_one_by_one": (
        from_linen(LinenOneByOne()),
        r"at norm: GhostBatchNorm got 1 examples, .* Called at .*test_network.py:\d+\.$"),
    "for_colour": (
        holding(lambda rngs: nnx.Conv(3, 4, (3, 3), rngs=rngs),
                lambda held, x: held(x.reshape(-1, 8, 8, 1)).reshape(len(x), -1)[:, :64]),
        r"at inner.0.held: .*1 // 1 != 3. It is given float32 \(8, 8, 1\) of each example, as .*"
        r"Called at .*test_network.py:\d+\.$"),
    "linen_for_small_images": (
        lambda num_classes, dtype, rngs: nnx.bridge.ToNNX(Flat(), rngs=rngs).lazy_init(
            jnp.zeros((32, 4, 4, 1)), False, None),
        r"at head: .*\(64, 10\), .* has shape \(16, 10\). It is given float32 .* Called at .*py:"),
    "dropped_out": (
        holding(lambda rngs: None, lambda _, x: dropout(x, 2.0, None, True, tag=0)),
        r" dropout: rate is 2.0; .* Called at .*test_network.py:\d+\.$"),
    "decayed": (
        holding(lambda rngs: GhostBatchNorm(64, ghost_size=16, decay=2.0, rngs=rngs)),
        r" GhostBatchNorm: decay is 2.0; .* Called at .*test_network.py:\d+\.$"),
    "no_module": (
        lambda num_classes, dtype, rngs: linen.Dense(10),
        r"returns a Dense; it must return a flax.nnx.Module \(a Linen module comes in as"),
    "uncallable": (
        Uncallable, r"Uncallable that cannot be called as \(images, train, keys\): too many"),
}
globals().update({name: model for name, (model, _) in UNFIT.items()})


@pytest.mark.parametrize("name", UNFIT)
def test_an_unfit_model_is_refused_before_compiling(name):
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None)
    said = f"^tests.update.test_network.{name}[ :].*{UNFIT[name][1]}"
    with pytest.raises(ValueError, match=said) as told:
        network.build(with_model(f"update.test_network.{name}", {}))
    assert "\n" not in str(told.value)
    assert compiled == []


@pytest.mark.parametrize(("settings", "message"), [
    (("network=bigbatch.models.wide_resnet.WideResNets",), "no 'WideResNets'. Did you mean WideR"),
    (("network=bigbatch.models.wide_resnets.WideResNet",), "no module 'bigbatch.models.wide_res"),
    (("network=WideResNet",), "config.network is 'WideResNet'; it must be a dotted path"),
    (("network=bigbatch.models.wide_resnet.he_normal.gain",), "no module"),
])
def test_a_path_that_leads_nowhere_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        network.build(tiny(*settings))


def test_arguments_that_do_not_fit_are_refused():
    config = tiny()
    with config.unlocked():
        config.model.widht = 2
    with pytest.raises(ValueError, match="unexpected keyword argument 'widht'; its own .* are "
                                         ".*depth, .*width$"):
        network.build(config)
    with pytest.raises(ValueError, match="missing a required .*argument: 'ghost_size'"):
        network.build(with_model("support.foreign_models.ConvNet", {}))


def test_float64_without_64_bit_arrays_is_refused():
    """JAX would go on in float32."""
    with pytest.raises(ValueError, match="config.dtype is float64, but JAX's 64-bit mode is off"):
        network.build(tiny("dtype=float64"))


class Stacked(nnx.Module):
    """Draws keys one by one, and between them as many at once as it has layers in a stack."""

    def __init__(self, num_classes, dtype, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def stack(rngs):
            return nnx.Linear(8, 8, rngs=rngs)

        self.first = nnx.Linear(64, 8, rngs=rngs)
        self.stacked = stack(rngs)
        self.last = nnx.Linear(8, num_classes, rngs=rngs)

    def __call__(self, images, train, keys):
        return self.last(self.first(images.reshape(len(images), -1)))


def test_parameters_are_drawn_with_the_keys_of_flaxs_own_stream():
    drawn, _ = network.build(with_model("update.test_network.Stacked", {})).init(np.uint32(7))
    key = jax.random.fold_in(jax.random.key(7, impl="threefry2x32"), network.INITIALISATION)
    flaxs = nnx.to_pure_dict(nnx.state(Stacked(10, jnp.float32, nnx.Rngs(key)), nnx.Param))
    jax.tree.map(np.testing.assert_array_equal, drawn, flaxs)
