"""A transformer on tokens keeps the promises of a run: those that tests hold for classification."""

import threading

import jax
import pytest

from bigbatch import train
from bigbatch.config import make_phases
from bigbatch.storage.logs import read_events
from tests.support import small_language, started, updates

PHASES = [(12, 6), (48, 3)]  # (batch, updates)


def config_of(*settings):
    config = small_language.get_config(",".join(["small", "dtype=float64", *settings]))
    assert [(phase.batch_size, phase.updates) for phase in make_phases(config)] == PHASES
    return config


def test_a_run_on_eight_devices_in_passes_is_its_updates_on_one_device(
    tmp_path, monkeypatch, capsys
):
    """With dropout, padding and documents of several lengths, through a change of batch.

    The run is a whole one, with its programs compiled ahead; the updates are called one by one.
    """
    done, compile_it, take = [], jax.stages.Lowered.compile, train.take_update
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda lowered, *rest: (
        done.append(threading.current_thread().name) or compile_it(lowered, *rest)))
    monkeypatch.setattr(train, "take_update", lambda *given, **named: (
        done.append("update") or take(*given, **named)))
    state = train.train_and_evaluate(config_of("microbatches=2"), tmp_path)

    expected, measured = updates.train(config_of(), 1, sum(count for _, count in PHASES))
    for name, tree, other in zip(state._fields, state, expected[-1], strict=True):
        assert updates.distance(jax.device_get(tree), other) <= 1e-10, name
    weights = [float(one.weight) for one in measured]
    assert len(set(weights)) > 5 and max(weights[:6]) < 12 * 8  # not every token counts
    events = read_events(tmp_path / "metrics.jsonl")
    for event in events:
        loss = measured[event["updates"] - 1].loss
        assert event["train_loss"] == pytest.approx(float(loss), rel=1e-10)
        assert event["tokens_seen"] == 8 * event["examples_seen"]
    assert len(events) > 5 and measured[-1].loss < measured[0].loss

    # Of two phases: the first update, passes, their reduction, the evaluation, the first state.
    assert done.count("compile") == 5 and set(done) == {"compile", "update"}
    assert "epoch 2.70, 1728 tokens, update 9: train loss" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_give_the_curve_of_one(tmp_path):
    """The short form is the test above; what a process feeds does not depend on the task."""
    language = {"file": "tests/support/small_language.py", "config": ("small", "dtype=float64")}
    started.end(started.start(tmp_path / "one", **language))
    for process in started.start_job(
            tmp_path / "two", "microbatches=2", processes=2, devices=2, **language):
        started.end(process)
    assert started.relative_difference(tmp_path / "two", tmp_path / "one") < 1e-10
    assert len(started.assert_same_lines(tmp_path / "two", tmp_path / "one")) > 5
