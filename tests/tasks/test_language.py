"""Next tokens: which count, what their loss is, and what follows from it."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bigbatch.config import base_config, tokens_per_example
from bigbatch.data import examples
from bigbatch.mistake import Mistake
from bigbatch.tasks import language


def config_of(vocabulary=16, length=8, name="tokens", **options):
    config = base_config()
    config.data.update({"name": name, "num_classes": vocabulary})
    config.data.options.update({"length": length, **options})
    return config


def prepared(config, rows):
    fields = {"tokens": jnp.asarray(rows, language.fields(config)["tokens"].dtype)}
    keys = jax.random.split(jax.random.key(0), len(rows))
    return language.prepare(config, fields, keys, True)


# Documents end with 1; 2 is padding.
ROWS = [[3, 4, 1, 5, 6, 1, 7, 8, 9], [1, 3, 4, 5, 1, 2, 2, 2, 2], [2, 2, 3, 4, 1, 1, 5, 6, 2]]


@pytest.mark.parametrize(("options", "counts"), (
    ({}, ("11111111",) * 3),
    ({"separator": 1}, ("11011011", "01110111", "11110011")),
    ({"padding": 2}, ("11111111", "11110000", "00111110")),
    ({"separator": 1, "padding": 2}, ("11011011", "01110000", "00110010")),
    # Where padding is the separator too, the end of a document is still learned.
    ({"separator": 1, "padding": 1}, ("11011011", "01110111", "11110011")),
))
def test_what_counts_is_neither_padding_nor_the_first_of_a_document(options, counts):
    inputs, targets = prepared(config_of(**options), ROWS)
    rows = np.array(ROWS)
    np.testing.assert_array_equal(inputs, rows[:, :-1])
    np.testing.assert_array_equal(targets["tokens"], rows[:, 1:])
    assert inputs.dtype == targets["tokens"].dtype == jnp.int32
    found = ["".join(str(int(count)) for count in row) for row in targets["counts"]]
    assert found == list(counts)


@pytest.mark.parametrize("smoothing", (0.0, 0.1))
def test_a_loss_is_the_mean_cross_entropy_of_what_counts(smoothing):
    config = config_of(separator=1, padding=2)
    config.label_smoothing = smoothing
    _, targets = prepared(config, ROWS)
    generator = np.random.default_rng(0)
    with jax.enable_x64(True):
        logits = jnp.asarray(generator.normal(size=(3, 8, 16)))
        found = language.losses(config, logits, targets)
        counts = np.array(targets["counts"])
        plain = optax.softmax_cross_entropy_with_integer_labels(logits, targets["tokens"])
        values, weights = found["loss"]
        assert values.dtype == weights.dtype == jnp.float64
        np.testing.assert_allclose(values, np.where(counts, plain, 0).sum(1), rtol=1e-12)
        np.testing.assert_array_equal(weights, counts.sum(1))
        assert set(found) == ({"loss", "objective"} if smoothing else {"loss"})
        if smoothing:
            smooth = optax.softmax_cross_entropy(logits, optax.smooth_labels(
                jax.nn.one_hot(targets["tokens"], 16, dtype=jnp.float64), smoothing))
            values, weights = found["objective"]
            np.testing.assert_allclose(values, np.where(counts, smooth, 0).sum(1), rtol=1e-12)

        # Any cut of the batch adds up to the same, and what does not count has no gradient.
        parts = [language.losses(config, logits[at : at + 1], jax.tree.map(
            lambda leaf, at=at: leaf[at : at + 1], targets))["loss"] for at in range(3)]
        for one, other in zip(zip(*parts, strict=True), found["loss"], strict=True):
            np.testing.assert_allclose(np.concatenate(one), other, rtol=1e-14)
        name = "objective" if smoothing else "loss"
        gradient = jax.grad(lambda x: language.losses(config, x, targets)[name][0].sum())(logits)
        assert (np.abs(gradient).max(-1) > 0).tolist() == counts.tolist()
        # An infinity where nothing counts stays there.
        wild = jnp.where(counts[..., None], logits, jnp.inf)
        np.testing.assert_array_equal(language.losses(config, wild, targets)["loss"], found["loss"])


def test_bfloat16_logits_are_judged_in_float32():
    config = config_of()
    _, targets = prepared(config, ROWS)
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(3, 8, 16)), jnp.bfloat16)
    values, weights = language.losses(config, logits, targets)["loss"]
    assert values.dtype == weights.dtype == jnp.float32
    np.testing.assert_allclose(
        values, language.losses(config, logits.astype(jnp.float32), targets)["loss"][0])


def test_perplexity_and_bits_a_byte_follow_from_the_mean_loss():
    means = {"loss": math.log(2) * 3}
    assert language.derived(config_of(), means) == {"perplexity": pytest.approx(8)}
    found = language.derived(config_of(name="text", vocabulary=256), means)
    assert found == {"perplexity": pytest.approx(8), "bits_per_byte": pytest.approx(3)}
    found = language.derived(config_of(bytes_per_token=4.0), means)
    assert found["bits_per_byte"] == pytest.approx(0.75)
    assert math.isfinite(language.derived(config_of(), {"loss": 1e9})["perplexity"])


@pytest.mark.parametrize(("vocabulary", "dtype"), (
    (256, np.uint8), (257, np.uint16), (65_536, np.uint16), (65_537, np.int32)))
def test_an_example_is_one_token_more_than_its_length(vocabulary, dtype):
    config = config_of(vocabulary, length=12)
    assert language.fields(config) == {"tokens": examples.Field((13,), np.dtype(dtype))}
    with config.unlocked():
        config.task = "bigbatch.tasks.language"
    assert tokens_per_example(config) == 12


def test_data_are_kept_on_the_devices_or_read_as_they_are_needed(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name, count in (("train", 81), ("test", 33)):
        np.arange(count, dtype="<u2").tofile(tmp_path / f"{name}.bin")
    config = config_of(100)
    config.data.update({"dir": str(tmp_path), "train_examples": 10, "test_examples": 4})
    found = language.load(config)
    assert isinstance(found, examples.InMemory)
    field = language.fields(config)["tokens"]
    for arrays, count in ((found.train, 10), (found.test, 4)):
        assert arrays["tokens"].shape == (count, *field.shape)
        assert arrays["tokens"].dtype == field.dtype
    config.data.streaming = True
    streamed = language.load(config)
    assert isinstance(streamed, examples.Streamed)
    assert (len(streamed.train), len(streamed.test)) == (10, 4)
    for record in (0, 9):
        arrays, reason = streamed.train.read(record, 0, 0)
        np.testing.assert_array_equal(arrays["tokens"], found.train["tokens"][record])
        assert reason == ""
    config.data.streaming = False
    monkeypatch.setattr(language, "RESIDENT", 100)
    with pytest.raises(Mistake, match="GiB on each device: set --config.data.streaming=True"):
        language.load(config)
