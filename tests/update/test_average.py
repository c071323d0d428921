"""The running average of the weights: what it is, and that a run keeps, evaluates, exports it."""

import jax
import numpy as np
import pytest

from bigbatch import checkpoint, evaluate, train
from bigbatch.export import export_run
from bigbatch.mistake import Mistake
from bigbatch.storage.logs import read_events
from tests.storage.test_continuing import assert_same_bits, terminate_at
from tests.support.updates import (
    NO_AUGMENTATION,
    conv_net,
    distance,
    inputs,
    prepare,
    training_set,
)

AVERAGES = (0.9, 0.5, 0.99)  # of three updates: the schedule may change it


@pytest.mark.parametrize(("devices", "passes"), [(1, 1), (2, 1), (1, 2)])
def test_it_begins_with_the_first_weights_and_follows_each_update(devices, passes):
    """The parameters and the running statistics, in float64, against the sum written out."""
    updater = prepare(
        conv_net("dtype=float64", "ema=0.9", f"microbatches={passes}", *NO_AUGMENTATION), devices)
    state, resident = updater.state, training_set(updater)
    expected = jax.device_get({"params": state.params, "batch_stats": state.batch_stats})
    assert_same_bits(jax.device_get(state.average), expected, "before the first update")
    for number, kept in enumerate(AVERAGES):
        _, batches = inputs(updater, 48, 48 * number)
        state, _ = updater.take(state, resident, batches, 0.1, 0.9, average=kept)
        now = jax.device_get({"params": state.params, "batch_stats": state.batch_stats})
        expected = jax.tree.map(lambda old, new, a=kept: a * old + (1 - a) * new, expected, now)
        assert distance(jax.device_get(state.average), expected) < 1e-12, number
        assert distance(now, expected) > 1e-3


def run(config, workdir):
    return train.train_and_evaluate(config, workdir, show=False)


@pytest.fixture(scope="module")
def averaged(tmp_path_factory):
    """A run with an average: its state and its workdir."""
    folder = tmp_path_factory.mktemp("averaged")
    return run(conv_net("ema=0.9", "tensorboard=true"), folder), folder


def test_a_run_evaluates_it_beside_the_weights_and_keeps_it(averaged, tmp_path):
    state, folder = averaged
    last = read_events(folder / "metrics.jsonl")[-1]
    assert last["test_loss_average"] != last["test_loss"]
    assert last["test_accuracy_average"] > 0.5
    found = evaluate.evaluate_run(folder)
    for name in ("test_loss", "test_accuracy", "test_loss_average", "test_accuracy_average"):
        assert found[name] == pytest.approx(last[name], rel=1e-5), name
    saved = checkpoint.load(folder)
    for name in ("params", "batch_stats"):
        assert_same_bits(saved["average"][name], jax.device_get(state.average[name]), name)
        model = checkpoint.load_model(folder, average=True)
        assert_same_bits(getattr(model, name), saved["average"][name], name)
        assert_same_bits(getattr(checkpoint.load_model(folder), name), saved[name], name)
    export_run(folder, "npz", tmp_path / "net.npz", average=True)
    with np.load(tmp_path / "net.npz") as file:
        np.testing.assert_array_equal(
            file["params/head/kernel"], saved["average"]["params"]["head"]["kernel"])
    board = next((folder / "tensorboard").iterdir()).read_bytes()
    assert b"test_accuracy_average" in board


def test_stopped_and_continued_it_has_the_same_bits(averaged, tmp_path, monkeypatch):
    """Among others in the midst of an evaluation, which is then made anew for both."""
    state, folder = averaged
    for stop in (16, 5):
        with monkeypatch.context() as patch, pytest.raises(train.Preempted):
            terminate_at(patch, stop)
            run(conv_net("ema=0.9"), tmp_path)
    assert_same_bits(run(conv_net("ema=0.9"), tmp_path), state, "after two stops")
    assert (tmp_path / "metrics.jsonl").read_bytes() == (folder / "metrics.jsonl").read_bytes()
    with pytest.raises(Mistake, match=r"ema: 0.9 saved, 0.0 now"):
        run(conv_net(), tmp_path)


def test_a_run_without_it_knows_nothing_of_it(tmp_path):
    run(conv_net("recipe.epochs=0.5", "recipe.falls=()"), tmp_path)
    assert set(checkpoint.load(tmp_path)) == {"params", "batch_stats", "opt_state"}
    assert not any("average" in key for key in read_events(tmp_path / "metrics.jsonl")[-1])
    with pytest.raises(Mistake, match=r"no average of the weights, as its config.ema is 0: .*"):
        checkpoint.load_model(tmp_path, average=True)
