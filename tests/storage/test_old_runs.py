"""A run of version 0.1 goes on, is evaluated and drawn; checkpoints keep their trees."""

import subprocess
import sys
import tarfile
from pathlib import Path

import jax
import pytest

from bigbatch import evaluate, train
from bigbatch.config import make_phases, saved_config
from bigbatch.mistake import Mistake
from bigbatch.storage import continuing
from bigbatch.storage.continuing import Position, position_of
from bigbatch.storage.logs import read_events
from bigbatch.update import network
from bigbatch.update.update import init_state
from tests.support.configs import load, tiny

# Made by commit aa9886c: the digits with sgd through two of three phases, and what it wrote when it
# then trained the third.
REPOSITORY = Path(__file__).parents[2]
OLD = Path(__file__).parent / "version_0.1"
CONFIG = ("increase,recipe.epochs=3,recipe.falls=((1,3),(2,3)),tensorboard=false,"
          "checkpoint_every_epochs=3,optimizer.name=sgd,recipe.momentum=0.0")


@pytest.fixture
def workdir(tmp_path):
    with tarfile.open(OLD / "workdir.tar.gz") as archive:
        archive.extractall(tmp_path / "run", filter="data")
    return tmp_path / "run"


def test_an_old_run_goes_on_to_what_its_own_version_made_of_it_and_is_drawn(workdir, tmp_path):
    train.train_and_evaluate(load("digits", f"{CONFIG},model.same_padding=True"), workdir,
                             show=False)
    expected = read_events(OLD / "finished_metrics.jsonl")
    events = read_events(workdir / "metrics.jsonl")
    assert len(events) == len(expected) and events[-1]["updates"] == 132
    for event, other in zip(events, expected, strict=True):
        assert event["phase"] == other["phase"]
        numbers = [{key: value for key, value in one.items() if key in other and key != "phase"}
                   for one in (event, other)]
        assert event.keys() - other.keys() <= {
            "noise_measured", "noise_gradient_square", "noise_trace"}
        # Twelve updates of the third phase in float32, on other machines and versions of JAX.
        assert numbers[0] == pytest.approx(numbers[1], rel=2e-2)
    drawn = subprocess.run(
        [sys.executable, "-m", "experiments.curves", f"--output={tmp_path / 'figure'}",
         f"old={workdir}"],
        cwd=REPOSITORY, capture_output=True, text=True)
    assert drawn.returncode == 0, drawn.stderr
    assert "| old" in drawn.stdout


def test_it_goes_on_under_no_other_network(workdir):
    """The Wide ResNet pads otherwise by now, which no key of the old config says."""
    with pytest.raises(Mistake, match="model.same_padding: True saved, False now"):
        train.train_and_evaluate(load("digits", CONFIG), workdir, show=False)


def test_a_changed_recipe_is_named_before_the_phases_that_follow_from_it(workdir):
    changed = f"{CONFIG},model.same_padding=True,recipe.learning_rate=0.2"
    with pytest.raises(Mistake, match=r"cannot continue: recipe.learning_rate: 0.4 saved, 0.2 now"):
        train.train_and_evaluate(load("digits", changed), workdir, show=False)


def test_phases_of_another_version_are_told_as_such():
    """A run whose batches were rounded fall by fall, as before 0.2, under the same recipe."""
    config = load("digits", "increase,recipe.falls=((12,1.5),(24,1.5),(32,1.5))")
    phases = make_phases(config)
    saved = continuing.describe_run(config, phases, Position(100_000, 1))
    assert continuing.changes(saved, config, phases) == ([], [])
    for phase in saved["phases"][1:]:
        phase["batch_size"] = 16
    refused, _ = continuing.changes(saved, config, phases)
    assert refused[0].startswith("the same recipe has other phases in this version")


def test_it_is_evaluated_to_what_it_was(workdir):
    found = evaluate.evaluate_run(workdir)
    logged = read_events(workdir / "metrics.jsonl")[-1]
    for key in ("updates", "examples_seen", "epoch", "test_loss", "test_accuracy"):
        assert found[key] == pytest.approx(logged[key], rel=1e-5), key


def test_a_key_that_an_old_config_has_not_gets_its_default():
    run = {"config": {"seed": 3, "data": {"name": "cifar10"}, "network": "my.Model",
                      "model": {"own": 1}}}
    config = saved_config(run)
    assert (config.seed, config.data.name, config.data.image_size) == (3, "cifar10", 8)
    assert config.model.to_dict() == {"own": 1}
    old = {"config": {"network": "bigbatch.models.wide_resnet.WideResNet", "model": {"depth": 10}}}
    assert saved_config(old).model.same_padding
    assert "same_padding" not in saved_config(old | {"version": "0.2.0"}).model


def test_a_pending_evaluation_of_version_0_1_is_read():
    run = {"examples_seen": 96, "updates": 2, "config": {}, "phases": [],
           "owed": {"updates": 2, "evaluate": True, "train_loss": 1.0}}
    assert position_of(run) == Position(96, 2, {"updates": 2, "train_loss": 1.0})
    assert position_of(run | {"owed": None}) == Position(96, 2, None)


@pytest.mark.parametrize(("name", "expected"), [
    ("momentum", ["opt_state/0/trace", "opt_state/1/trace"]),
    ("nesterov", ["opt_state/0/trace", "opt_state/1/trace"]),
    ("sgd", []),
    ("adam", [f"opt_state/{place}/{field}" for place in (0, 1)
              for field in ("count", "mu", "nu", "mu_weight", "nu_weight")]),
])
@pytest.mark.parametrize("decoupled", [False, True])
def test_the_trees_of_all_optimizers_are_those_that_checkpoints_have(name, expected, decoupled):
    """The place in the optimizer's chain is a part of the path under which a leaf is kept."""
    config = tiny(f"optimizer.name={name}", f"optimizer.decoupled={decoupled}",
                  *(["recipe.momentum=0.0"] if name == "sgd" else []))
    state = init_state(config, network.build(config))
    leaves = jax.tree_util.tree_leaves_with_path(state.opt_state)
    parameters = len(jax.tree.leaves(state.params))
    place = 0 if decoupled else 1  # the decay comes before the accumulator, unless it is decoupled
    kept = {}
    for path, _ in leaves:
        top = "opt_state/" + "/".join(
            str(getattr(key, "idx", getattr(key, "name", ""))) for key in path[:2])
        kept[top] = kept.get(top, 0) + 1
    wanted = [path for path in expected if path.split("/")[1] == str(place)]
    assert kept == {
        path: 1 if path.endswith(("count", "weight")) else parameters for path in wanted}
