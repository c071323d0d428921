"""The main job on real CIFAR-10 images, end to end, through a change of the batch."""

import pytest

from bigbatch import evaluate, train
from bigbatch.config import make_phases
from bigbatch.storage.logs import read_events
from tests.support import configs
from tests.support.sample_data import data_dir


def test_two_phases_of_a_small_wide_resnet(tmp_path):
    config = configs.load("cifar10", ",".join([
        "increase", "recipe.epochs=3", "recipe.falls=((2,5),)", "data.train_split=train[:1024]",
        "data.train_examples=1024", "data.test_split=test[:500]", "data.test_examples=500",
        "model.depth=10", "model.width=1", "ghost_size=8", "recipe.batch_size=64",
        "max_per_device_batch=64", "eval_batch_size=63",
        "log_every_epochs=0.2", "tensorboard=false", f"data.dir={data_dir('cifar10')}",
    ]))
    phases = make_phases(config)
    assert [(phase.batch_size, phase.updates) for phase in phases] == [(64, 32), (320, 4)]
    train.train_and_evaluate(config, tmp_path, show=False)
    events = read_events(tmp_path / "metrics.jsonl")
    assert {event["phase"] for event in events} == {"noise/1", "noise/5"}
    assert events[-1]["updates"] == 36 and events[-1]["examples_seen"] == 3328
    # Ten classes: chance has a loss of 2.3 and an accuracy of 0.1.
    assert events[-1]["train_loss"] < 2.1
    assert events[-1]["test_accuracy"] > 0.2
    found = evaluate.evaluate_run(tmp_path)
    assert found["test_loss"] == pytest.approx(events[-1]["test_loss"], rel=1e-5)
    assert found["test_accuracy"] == events[-1]["test_accuracy"]
