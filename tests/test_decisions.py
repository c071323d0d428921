"""Runs that decide when their batch grows: the same decisions and bits, however they come about."""

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from bigbatch import train
from bigbatch.config import make_phases
from bigbatch.job.devices import make_mesh
from bigbatch.mistake import Mistake
from bigbatch.storage import checkpoint, continuing, replay
from bigbatch.storage.logs import read_events
from tests.storage.test_continuing import assert_same_bits, run, terminate_at
from tests.support import small_config

DECIDES = ("strategy=measured", "measured.every_epochs=0.3", "measured.stay_epochs=0.8",
           "noise.window_epochs=0.5", "measured.threshold=2", "limits.max_batch_size=96",
           "data.train_examples=480", "recipe.epochs=4", "dtype=float64", "log_every_epochs=1")


def small(*settings):
    """A perceptron whose batch may grow from 48 to 96; `test_loop` has longer ladders."""
    return small_config.get_config(",".join(["resident", *DECIDES, *settings]))


def grown(folder):
    """(examples seen, batch from there on) of each decision, by the log."""
    return [(event["examples_seen"], event["grows_to"])
            for event in read_events(Path(folder) / "metrics.jsonl") if "grows_to" in event]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupts: its state and its workdir."""
    folder = tmp_path_factory.mktemp("whole")
    return run(small(), folder), folder


def test_decisions_are_events_and_phases_follow_from_them(whole):
    _, folder = whole
    decisions = grown(folder)
    assert [batch for _, batch in decisions] == [96]
    saved = checkpoint.find_newest(folder).run
    assert [tuple(pair) for pair in saved["growth"]["decisions"]] == decisions
    phases = make_phases(small(), tuple(decisions))
    assert [phase.batch_size for phase in phases if phase.start_example in dict(decisions)] == [
        96]
    assert [phase["end_example"] for phase in saved["phases"]] == [
        phase.end_example for phase in phases]
    for event in read_events(folder / "metrics.jsonl"):
        if event.get("batch_asked_for") is not None:
            assert event["batch_asked_for"] == pytest.approx(2 * event["noise_measured"])
    for at, batch in decisions:  # what was asked for reached the rung
        event = next(event for event in read_events(folder / "metrics.jsonl")
                     if event["examples_seen"] == at)
        assert event["batch_asked_for"] >= batch == 2 * event["batch_size"]


def test_stopped_again_and_again_it_decides_the_same(whole, tmp_path, monkeypatch):
    state, folder = whole
    stops = []
    (decided_at, _), = grown(folder)
    at_decision = 1 + decided_at // 48  # the first update of the larger batch is not taken
    for count in (at_decision - 1, 2, 1, 3, 9, 9, 9):
        with monkeypatch.context() as patch:
            terminate_at(patch, count)
            try:
                ended = run(small(), tmp_path)
                break
            except train.Preempted:
                stops.append(checkpoint.find_newest(tmp_path).run["examples_seen"])
    assert len(stops) > 3 and decided_at in stops, stops
    assert_same_bits(ended, state, f"after stops at {stops}")
    assert (tmp_path / "metrics.jsonl").read_bytes() == (folder / "metrics.jsonl").read_bytes()


def test_a_replay_of_its_decisions_leaves_its_bits(whole, tmp_path):
    state, folder = whole
    replayed = replay.replay(small(), str(folder))
    assert (replayed.strategy, replayed.by_hand) == (
        "by_hand", tuple((f"{at} examples", batch) for at, batch in grown(folder)))
    assert_same_bits(run(replayed, tmp_path), state, "replayed")
    with pytest.raises(Mistake, match="holds a run of the strategy by_hand, which decides nothing"):
        replay.replay(small(), str(tmp_path))


def test_one_device_decides_what_eight_do(whole, tmp_path, monkeypatch):
    state, folder = whole
    monkeypatch.setattr(train, "make_mesh", lambda **_: make_mesh(jax.devices()[:1]))
    alone = run(small(), tmp_path)
    assert grown(tmp_path) == grown(folder)
    for leaf, twin in zip(jax.tree.leaves(alone), jax.tree.leaves(state), strict=True):
        np.testing.assert_allclose(leaf, twin, rtol=1e-9, atol=1e-12)


def test_other_averages_than_it_decided_by_are_refused(whole):
    for setting in ("noise.window_epochs=2", "measured.threshold=1", "measured.by=all"):
        with pytest.raises(ValueError, match="another config") as caught:
            run(small("noise.every_epochs=1", setting), whole[1])
        assert setting.partition("=")[0] in str(caught.value)


def test_killed_after_a_decision_and_before_its_save_it_may_begin_anew(whole, tmp_path):
    for name in ("config.json", "metrics.jsonl"):
        shutil.copy(whole[1] / name, tmp_path)
    continuing.check_anew(tmp_path, tmp_path, small())
    with pytest.raises(Mistake, match="measured.threshold: 2.0 saved, 3.0 now"):
        continuing.check_anew(tmp_path, tmp_path, small("measured.threshold=3"))


def test_it_grows_once_the_loss_is_low_enough(tmp_path):
    run(small("measured.rule=loss", "measured.losses=((2.0,96),)"), tmp_path)
    (at, batch), = grown(tmp_path)
    events = read_events(tmp_path / "metrics.jsonl")
    assert batch == 96
    assert all(event["batch_asked_for"] is None for event in events
               if event["examples_seen"] < at and "batch_asked_for" in event)


@pytest.mark.slow
def test_it_decides_by_all_parameters(tmp_path):
    """The short form is by the norms: what differs is which average a rule reads."""
    by_all = ("measured.by=all", "noise.every_epochs=0.3", "noise.ghosts=4")
    run(small(*by_all, "measured.rule=norm_test", "measured.threshold=0.3"), tmp_path)
    events = read_events(tmp_path / "metrics.jsonl")
    assert grown(tmp_path) and "noise_full" in events[-1]


def test_what_it_cannot_decide_by_is_told(tmp_path):
    for settings, told in (
        (("limits.max_batch_size=None",), "measured has no largest batch"),
        (("measured.by=all",), "noise.every_epochs is 0, so the noise is never measured"),
        (("measured.rule=cabs",), "'cabs', which reads the noise itself"),
        (("measured.by=some",), "config.measured.by is 'some'; allowed are norms, all"),
    ):
        with pytest.raises(Mistake, match=told):
            run(small(*settings), tmp_path)
    with pytest.raises(Mistake, match="a run decides on its way where its phases end"):
        run(small(), tmp_path, stop_after_phase="0")
    assert not list(tmp_path.iterdir())
