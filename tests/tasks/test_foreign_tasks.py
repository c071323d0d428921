"""Tasks of a user's own: through a whole run, and the same on any devices in any passes."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from bigbatch import checkpoint, evaluate, train
from bigbatch.config import saved_config
from bigbatch.export import export_run
from bigbatch.mistake import Mistake
from bigbatch.plan import plan
from bigbatch.storage.logs import read_events
from bigbatch.tasks import contract
from bigbatch.update import network
from tests.support.foreign_tasks import letters
from tests.support.updates import (
    NO_AUGMENTATION,
    distance,
    inputs,
    pictures,
    prepare,
    training_set,
    with_model,
)
from tests.support.updates import train as take_updates

WEIGHTS = (1.0, 0.0, 2.5, 0.5, 1.0, 3.0, 0.1, 1.0, 0.0, 4.0)


def task_config(name, *settings, **options):
    """The tiny config with a task of `foreign_tasks` and softmax regression for its network."""
    width = {"MultiLabel": 3, "Regression": 1, "Words": 7}.get(name, 10)
    config = with_model(
        "support.foreign_models.Regression", {}, f"task=tests.support.foreign_tasks.{name}",
        f"data.num_classes={width}", f"task_options.weights={WEIGHTS}", *settings)
    if name == "Words":
        config.network, config.model = "tests.support.foreign_tasks.Bigrams", ConfigDict(options)
        config.data.update({"train_examples": 480, "test_examples": 44})
    return config


NAMES = {
    "Mixup": ("loss", "accuracy"), "MultiLabel": ("loss", "accuracy"),
    "Regression": ("loss", "absolute_error", "deviation"), "ClassWeights": ("loss", "accuracy"),
    "Words": ("loss",),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_task_of_a_users_own_is_trained_evaluated_and_continued(name, tmp_path):
    config = task_config(name, "recipe.learning_rate=0.01", "tensorboard=true")
    plan(config, 4)
    with pytest.raises(train.StoppedAfterPhase):
        train.train_and_evaluate(config, tmp_path, stop_after_phase="0", show=False)
    train.train_and_evaluate(config, tmp_path, show=False)
    events = read_events(tmp_path / "metrics.jsonl")
    first, last = (next(event for event in order if "test_loss" in event)
                   for order in (events, events[::-1]))
    assert last["test_loss"] < first["test_loss"]
    measured = [key for key in last if key.startswith(("train_", "test_"))]
    assert measured == [f"{split}_{one}" for split in ("train", "test") for one in NAMES[name]]
    found = evaluate.evaluate_run(tmp_path)
    assert found["test_loss"] == pytest.approx(last["test_loss"], rel=1e-6)
    (board,) = list((tmp_path / "tensorboard").iterdir())[-1:]
    assert b"test_loss" in board.read_bytes()
    starts = [event.get("data") for event in read_events(tmp_path / "timing.jsonl")
              if event["event"] == "start"]
    about = {"letters": "made up", "lengths": [2, 9]} if name == "Words" else None
    assert starts == [about, about]
    if name == "Regression":
        assert last["test_deviation"] == pytest.approx(last["test_loss"] ** 0.5)


def test_what_is_shown_is_the_accuracy_or_else_the_loss(tmp_path, capsys):
    for name, at, shown in (("Words", "epoch 0.50, 1920 tokens", "test loss"),
                            ("ClassWeights", "epoch 0.50", "test accuracy")):
        train.train_and_evaluate(
            task_config(name, "recipe.epochs=0.5", "recipe.falls=()"), tmp_path / name)
        assert re.search(rf"{at}, update \d+: train loss \d\.\d+, {shown} \d\.\d+\n",
                         capsys.readouterr().err)


# --- means are over weights, however the batch is cut --------------------------------------------
@pytest.mark.parametrize("name", [
    name if name in ("Mixup", "Words") else pytest.param(name, marks=pytest.mark.slow)
    for name in NAMES])
def test_a_task_is_the_same_on_any_devices_in_any_passes(name):
    """Three updates of 5 ghost batches, whose weights are unequal."""
    settings = ("dtype=float64", "recipe.batch_size=80", "recipe.falls=()")
    wanted = None
    for devices, passes in ((1, 1), (1, 2), (2, 1), (2, 2), (4, 1), (4, 2)):
        states, measured = take_updates(
            task_config(name, *settings, f"microbatches={passes}"), devices, 3)
        found = states[-1], [one.means for one in measured], [one.weight for one in measured]
        wanted = wanted or found
        for one, other in zip(found, wanted, strict=True):
            assert distance(one, other) <= 1e-12, (devices, passes)


@pytest.mark.parametrize(("devices", "passes"), [(1, 1), (1, 2), (2, 2), (4, 1)])
def test_the_gradient_is_that_of_the_weighted_mean_of_the_whole_batch(devices, passes):
    """In closed form: rate times the sum of w (p - y) x over the sum of w."""
    updater = prepare(task_config(
        "ClassWeights", "dtype=float64", "optimizer.name=sgd", "recipe.momentum=0.0",
        "optimizer.weight_decay=0.0", f"microbatches={passes}", *NO_AUGMENTATION), devices)
    before = jax.device_get(updater.state.params["head"])
    records, batches = inputs(updater, 80)
    images, targets = pictures(updater, records)
    state, measured = updater.take(updater.state, training_set(updater), batches, 0.5, 0.0)
    pixels, weights = images.reshape(80, 64), targets @ np.array(WEIGHTS)
    logits = pixels @ before["kernel"] + before["bias"]
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    slope = weights[:, None] * (shares - targets) / weights.sum()
    moved = jax.tree.map(np.subtract, jax.device_get(state.params["head"]), before)
    expected = {"kernel": -0.5 * pixels.T @ slope, "bias": -0.5 * slope.sum(axis=0)}
    assert distance(moved, expected) < 1e-12
    losses = -np.log((shares * targets).sum(axis=1))
    assert measured.loss == pytest.approx((weights * losses).sum() / weights.sum(), rel=1e-12)
    assert measured.weight == pytest.approx(weights.sum(), rel=1e-12)
    right = shares.argmax(axis=1) == targets.argmax(axis=1)
    assert measured.means["accuracy"] == pytest.approx(
        (weights * right).sum() / weights.sum(), rel=1e-12)


def test_mixup_takes_partners_from_the_ghost_batch_and_draws_by_example():
    """The first of a ghost batch with its last; so a microbatch of the second gives the same."""
    config = task_config("Mixup", *NO_AUGMENTATION)
    task, ghost = contract.task_of(config), config.ghost_size
    random = np.random.default_rng(0)
    fields = {"images": random.integers(0, 256, (2 * ghost, 8, 8, 1), np.uint8),
              "labels": random.integers(0, 10, 2 * ghost).astype(np.int32)}
    keys = jax.random.split(jax.random.key(0), 2 * ghost)
    whole = task.prepare(config, fields, keys, True)
    half = task.prepare(
        config, {name: array[ghost:] for name, array in fields.items()}, keys[ghost:], True)
    for one, other in zip(whole, half, strict=True):
        np.testing.assert_array_equal(one[ghost:], other)
    assert 1 < np.sum(whole[1][0] > 0) <= 2 or fields["labels"][0] == fields["labels"][ghost - 1]
    np.testing.assert_allclose(whole[1].sum(axis=1), 1.0, rtol=1e-6)


# --- data that are read while the run trains ------------------------------------------------------
def test_a_stream_of_a_users_own_gives_what_the_same_data_in_memory_give(tmp_path):
    """Also where the noise is measured, and where the run decides on its way what comes next."""
    decides = ("strategy=measured", "measured.rule=loss", "measured.losses=((9.0,96),)",
               "measured.every_epochs=0.3", "measured.stay_epochs=0.7", "noise.window_epochs=0.2",
               "limits.max_batch_size=96")
    lines = {}
    for streaming in (False, True):
        workdir = tmp_path / str(streaming)
        train.train_and_evaluate(
            task_config("Words", f"data.streaming={streaming}", "dtype=float64",
                        "noise.every_epochs=0.4", "noise.ghosts=11", *decides), workdir, show=False)
        batches = [event["batch_size"] for event in read_events(workdir / "metrics.jsonl")]
        assert set(batches) == {48, 96} and batches == sorted(batches)
        lines[streaming] = [
            [value for value in event.values() if isinstance(value, float)]
            for event in read_events(workdir / "metrics.jsonl")]
    assert len(lines[True]) == len(lines[False]) > 5
    assert "noise_full_trace" in (workdir / "metrics.jsonl").read_text()
    for one, other in zip(lines[True], lines[False], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-10)


def test_a_model_that_looks_at_other_examples_is_seen_behind_an_embedding():
    network.build(task_config("Words"))
    with pytest.raises(Mistake, match="Bigrams mixes the examples of a batch at .*foreign_tasks"):
        network.build(task_config("Words", mix=True))


# --- a trained network ----------------------------------------------------------------------------
def test_a_model_of_another_task_is_called_with_its_fields(tmp_path):
    short = ("recipe.epochs=0.5", "recipe.falls=()")
    train.train_and_evaluate(task_config("Words", *short), tmp_path / "words", show=False)
    model = checkpoint.load_model(tmp_path / "words")
    rows = letters(7)
    logits = model({"letters": rows})
    assert logits.shape == (7, 8, 7) and logits.dtype == np.float32
    embedded = model.params["embed"]["embedding"][rows[:, :-1]]
    expected = embedded @ model.params["head"]["kernel"] + model.params["head"]["bias"]
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
    for given, said in (
        (rows, r"called with a dict of its fields, letters: model\(\{'letters': array\}\)"),
        ({"letters": rows.astype(np.int64)}, r"'letters' is int64 \(7, 9\); it must be uint16"),
        ({"words": rows}, "'words' is no field of tests.support.foreign_tasks.Words"),
    ):
        with pytest.raises(Mistake, match=said):
            model(given)
    with pytest.raises(Mistake, match="writes a function of images, and the examples of .*Words"):
        export_run(tmp_path / "words", "stablehlo", tmp_path / "out")
    export_run(tmp_path / "words", "npz", tmp_path / "out.npz")
    assert "params/embed/embedding" in np.load(tmp_path / "out.npz").files

    train.train_and_evaluate(task_config("Regression", *short), tmp_path / "number", show=False)
    images = np.zeros((3, 8, 8, 1), np.uint8)
    assert checkpoint.load_model(tmp_path / "number")(images).shape == (3, 1)


def test_the_example_of_the_page_learns(tmp_path, monkeypatch):
    text = (Path(__file__).parents[2] / "docs/tasks.md").read_text(encoding="utf-8")
    (tmp_path / "task_of_the_page.py").write_text(text.split("```python\n")[1].split("```")[0])
    monkeypatch.syspath_prepend(tmp_path)
    config = task_config("Mixup", "task=task_of_the_page", "data.num_classes=5")
    train.train_and_evaluate(config, tmp_path / "run", show=False)
    losses = [event["test_loss"] for event in read_events(tmp_path / "run/metrics.jsonl")
              if "test_loss" in event]
    assert losses[-1] < losses[0] < np.log(2)


def test_a_run_from_before_there_were_tasks_has_the_default(tmp_path):
    config = task_config("Words")
    saved = json.loads(config.to_json())
    del saved["task"], saved["task_options"]
    assert saved_config({"config": saved}).task == "bigbatch.tasks.classification"
