"""Whole runs whose state is split over devices: saved, continued, evaluated, exported."""

import jax
import numpy as np
import pytest

from bigbatch import checkpoint, evaluate, train
from bigbatch.export import export_run
from bigbatch.job import devices
from bigbatch.storage.logs import read_events
from tests.storage.test_continuing import assert_same_bits, terminate_at
from tests.support import small_config, started
from tests.support.updates import distance
from tests.update.test_sharding import OPTIMIZER, PARAMETERS, stack

# 9 updates of 3 ghost batches, then 12 of 9.
SHORT = ("recipe.epochs=1.5", "log_every_epochs=0.05", "eval_every_epochs=0.5",
         "checkpoint_every_epochs=0.2")


def run(workdir, *settings, **options):
    return train.train_and_evaluate(stack(*SHORT, *settings), workdir, show=False, **options)


def assert_same_curve(workdir, other):
    """Every number of metrics.jsonl, of evaluations of the average too."""
    events, others = (read_events(folder / "metrics.jsonl") for folder in (workdir, other))
    assert len(events) == len(others) > 5
    for event, twin in zip(events, others, strict=True):
        assert event.keys() == twin.keys()
        for key, value in event.items():
            assert value == (pytest.approx(twin[key], rel=1e-10)
                             if isinstance(value, float) else twin[key]), key
    assert "test_loss_average" in events[-1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run whose state is whole on each of eight devices, and its state."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, jax.device_get(run(folder))


def test_a_run_goes_on_with_another_split_and_has_the_same_curve(whole, tmp_path, monkeypatch):
    """Parameters in eight pieces, then on four devices the optimizer's state in two."""
    folder, state = whole
    with pytest.raises(train.StoppedAfterPhase):
        run(tmp_path, *PARAMETERS, stop_after_phase="0")
    make_mesh = devices.make_mesh
    monkeypatch.setattr(
        train, "make_mesh", lambda shards: make_mesh(jax.devices()[:4], shards))
    ended = run(tmp_path, *OPTIMIZER, "sharding.shards=2")
    assert distance(jax.device_get(ended), state) <= 1e-10
    assert_same_curve(tmp_path, folder)
    saved = jax.tree.leaves(checkpoint.load(tmp_path)["opt_state"])
    assert_same_bits(saved, jax.tree.leaves(jax.device_get(ended.opt_state)), "saved")


def test_stopped_and_continued_with_the_same_split_it_has_the_same_bits(
    whole, tmp_path, monkeypatch
):
    """And what is made of its checkpoint is what is made of any other."""
    folder, _ = whole
    split = (*PARAMETERS, "microbatches=2", "dtype=float32")
    with monkeypatch.context() as patch, pytest.raises(train.Preempted):
        terminate_at(patch, 13)
        run(tmp_path / "stopped", *split)
    ended = run(tmp_path / "stopped", *split)
    never = run(tmp_path / "never", *split)
    assert_same_bits(jax.device_get(ended), jax.device_get(never), "continued")
    assert (tmp_path / "stopped/metrics.jsonl").read_bytes() == (
        tmp_path / "never/metrics.jsonl").read_bytes()

    last = read_events(tmp_path / "never/metrics.jsonl")[-1]
    found = evaluate.evaluate_run(tmp_path / "never")
    for name in ("test_loss", "test_loss_average"):
        assert found[name] == pytest.approx(last[name], rel=1e-5)
    export_run(tmp_path / "never", "npz", tmp_path / "net.npz")
    with np.load(tmp_path / "net.npz") as file:
        np.testing.assert_array_equal(
            file["params/blocks/1/dense/kernel"], never.params["blocks"][1]["dense"]["kernel"])
    for source in ("net.npz", "never"):
        begun = run(tmp_path / f"begun_{source}", *split, f"init_from={tmp_path / source}",
                    "recipe.learning_rate=1e-30", "recipe.falls=()", "recipe.epochs=0.1")
        assert_same_bits(jax.device_get(begun.params), jax.device_get(never.params), source)


@pytest.mark.parametrize("settings", [
    ("sharding.parameters=true", "microbatches=2"),
    pytest.param(("sharding.optimizer=true",), marks=pytest.mark.slow)])
def test_two_processes_split_a_state_between_them(tmp_path, settings):
    """The curve of this process, and a start of one process with the checkpoint of two."""
    own = ("dtype=float64", "sharding.smallest=1", "ema=0.9", *settings)
    train.train_and_evaluate(
        small_config.get_config("resident,dtype=float64,ema=0.9"), tmp_path / "one", show=False)
    job = started.start_job(tmp_path / "two", *own, **started.SMALL, processes=2, devices=2,
                            flags=("--stop_after_phase=0",))
    for process in job:
        started.end(process, status=3)
    started.end(started.start(tmp_path / "two", *own, **started.SMALL, devices=3))
    assert started.relative_difference(tmp_path / "two", tmp_path / "one") < 1e-10
