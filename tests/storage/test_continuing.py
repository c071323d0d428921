"""A run that was stopped and continued leaves the bits of one that was not."""

import importlib
import json
import math
import os
import re
import shutil
import signal
import sys
import types

import jax
import numpy as np
import pytest

from bigbatch import evaluate, schedule, train
from bigbatch.config import make_phases
from bigbatch.job import preemption
from bigbatch.mistake import Mistake
from bigbatch.storage import bucket, checkpoint, continuing, logs
from bigbatch.storage.logs import read_events
from tests.support import started
from tests.support.updates import conv_net
from tests.watching import test_tensorboard

# An evaluation takes three batches on each of the 8 devices, so that a stop can fall between.
SMALL_BATCHES = ("eval_batch_size=20",)


def small(*settings):
    """Two epochs of the digits in three phases, with convolutions and dropout."""
    return conv_net(*settings, features=8, dropout_rate=0.1)


def run(config, workdir, **options):
    return train.train_and_evaluate(config, workdir, show=False, **options)


def assert_same_bits(state, other, what):
    """Every leaf of two states, and the trees themselves."""
    assert jax.tree.structure(state) == jax.tree.structure(other), what
    for (path, leaf), twin in zip(
        jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(other), strict=True
    ):
        name = f"{what}: {jax.tree_util.keystr(path)}"
        assert leaf.dtype == twin.dtype, name
        assert np.asarray(leaf).tobytes() == np.asarray(twin).tobytes(), name


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of three phases that nothing interrupts: its state and its workdir."""
    folder = tmp_path_factory.mktemp("whole")
    return run(small(*SMALL_BATCHES), folder), folder


def terminate_at(monkeypatch, count, number=signal.SIGTERM):
    """Sends this process a real signal before its `count`-th program with a reduction."""
    passed = 0
    dispatch = preemption.Watch.before_reduction

    def counting(watch):
        nonlocal passed
        passed += 1
        if passed == count:
            os.kill(os.getpid(), number)
        dispatch(watch)

    monkeypatch.setattr(preemption.Watch, "before_reduction", counting)


def test_stopped_by_sigterm_again_and_again_it_ends_with_the_same_bits(
    whole, tmp_path, monkeypatch
):
    """Each start gets a few updates or evaluation batches further, so that stops fall before, at
    and after each phase boundary and inside evaluations."""
    config = small(*SMALL_BATCHES, "tensorboard=true")
    state, folder = whole
    stops, discarded = [], [1]  # by TensorBoard: steps from this one on that earlier starts wrote
    for attempt in range(40):
        with monkeypatch.context() as patch:
            # The 16th is the first batch of the first evaluation, the next 2nd its second one.
            terminate_at(patch, (16, 2, 5, 6, 1, 7)[attempt % 6])
            try:
                ended = run(config, tmp_path)
                break
            except train.Preempted:
                newest = checkpoint.find_newest(tmp_path)
                pending = newest.run["pending_evaluation"] is not None
                stops.append((newest.run["updates"], pending))
                discarded.append(newest.run["examples_seen"] + (not pending))
    else:
        pytest.fail(f"not at its end after 40 starts: {stops}")
    boundaries = {
        phase.start_update + phase.updates for phase in make_phases(config)[:-1]
    }
    stopped_at = {updates for updates, _ in stops}
    assert len(stopped_at) >= 5, stops
    assert any(owed for _, owed in stops), f"no stop fell into an evaluation: {stops}"
    assert stopped_at & {b + by for b in boundaries for by in (-1, 0, 1)}, (stops, boundaries)
    assert_same_bits(ended, state, "after stops at updates " + str(sorted(stopped_at)))
    assert (tmp_path / "metrics.jsonl").read_bytes() == (folder / "metrics.jsonl").read_bytes()
    boards = sorted((tmp_path / "tensorboard").iterdir())
    assert [event.step for board in boards for event in test_tensorboard.read(board)
            if event.HasField("session_log")] == discarded


@pytest.mark.parametrize("index", [0, 1])
def test_stop_after_phase_hands_over_at_the_boundary(whole, tmp_path, index):
    state, folder = whole
    config = small(*SMALL_BATCHES)
    phase = make_phases(config)[index]
    with pytest.raises(train.StoppedAfterPhase, match=phase.name):
        run(config, tmp_path, stop_after_phase=phase.name)
    newest = checkpoint.find_newest(tmp_path)
    assert newest.run["examples_seen"] == phase.end_example
    with pytest.raises(train.StoppedAfterPhase):  # nothing is left to do up to there
        run(config, tmp_path, stop_after_phase=str(index))
    assert_same_bits(run(config, tmp_path), state, f"handed over after phase {index}")
    assert (tmp_path / "metrics.jsonl").read_bytes() == (folder / "metrics.jsonl").read_bytes()


def test_an_unknown_phase_to_stop_after_is_named(tmp_path):
    with pytest.raises(ValueError, match="noise/3.*phases are 0 or noise/1, 1 or noise/2"):
        run(small(), tmp_path / "new", stop_after_phase="noise/3")
    assert not (tmp_path / "new").exists()


def test_a_finished_run_is_left_as_it_is(whole):
    state, folder = whole
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")
              if path.is_file() and path.name not in ("lock", "timing.jsonl", "config.json")}
    ended = run(small(*SMALL_BATCHES), folder)
    assert_same_bits(ended, state, "finished run, started again")
    after = {path: path.stat().st_mtime_ns for path in before}
    assert before == after


def test_metrics_hold_each_event_once_and_all_that_was_due(whole):
    _, folder = whole
    config = small()
    phases = make_phases(config)
    events = read_events(folder / "metrics.jsonl")
    seen = [event["examples_seen"] for event in events]
    assert seen == sorted(set(seen))
    n = config.data.train_examples
    starts = [
        phase.start_example + k * phase.batch_size for phase in phases
        for k in range(phase.updates)
    ]
    ends = {phase.end_example for phase in phases}

    def due(every):
        size = round(every * n)
        reached = set()
        for start in starts:
            end = start + schedule.phase_at(phases, start).batch_size
            if end // size > start // size:
                reached.add(end)
        return reached

    evaluations = due(config.eval_every_epochs) | {phases[-1].end_example}
    assert {e["examples_seen"] for e in events if "test_loss" in e} == evaluations
    assert set(seen) == due(config.log_every_epochs) | evaluations | ends
    for event in events:
        phase = next(phase for phase in phases if phase.name == event["phase"])
        assert event["batch_size"] == phase.batch_size
        assert event["epoch"] == event["examples_seen"] / n
        made = (event["examples_seen"] - phase.start_example) // phase.batch_size
        assert event["updates"] == phase.start_update + made
        rate, b = event["learning_rate"], event["batch_size"]
        assert event["noise_scale"] == pytest.approx(rate / (1 - 0.9) * (n / b - 1), rel=1e-12)


def test_evaluating_a_workdir_finds_its_last_event_again(whole, tmp_path):
    last = read_events(whole[1] / "metrics.jsonl")[-1]
    found = evaluate.evaluate_run(whole[1])
    assert {name: last[name] for name in found} == pytest.approx(found, rel=1e-6)
    assert found["test_accuracy"] == last["test_accuracy"]
    with pytest.raises(ValueError, match="has no checkpoint: no run was made there"):
        evaluate.evaluate_run(tmp_path)


def test_an_evaluation_is_printed_as_json_has_numbers(monkeypatch, capsys):
    """A quantity without any weight in the whole test set has no mean."""
    found = {"updates": 3, "test_loss": 0.5, "test_rare": math.nan}
    given = types.SimpleNamespace(workdir="run", data_dir="", at=None)
    monkeypatch.setattr(evaluate, "evaluate_run", lambda *asked: found)
    monkeypatch.setattr(evaluate, "flags", types.SimpleNamespace(FLAGS=given))
    evaluate.main([])
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == (
        found | {"test_rare": None})


def test_a_loaded_checkpoint_is_the_state(whole):
    """As README loads it: by name, without the config."""
    state, folder = whole
    loaded = checkpoint.load(folder)
    for name in ("params", "batch_stats"):
        for leaf, twin in zip(
            jax.tree.leaves(loaded[name]), jax.tree.leaves(getattr(state, name)), strict=True
        ):
            np.testing.assert_array_equal(leaf, twin)


def test_the_run_learns(whole):
    events = read_events(whole[1] / "metrics.jsonl")
    assert events[-1]["train_loss"] < 0.5 * events[0]["train_loss"]
    assert events[-1]["test_accuracy"] > 0.5


def test_what_would_have_changed_the_trajectory_is_refused_side_by_side(whole):
    _, folder = whole
    for config, key in (
        (small("seed=1"), "seed: 0 saved, 1 now"),
        (conv_net(features=16, dropout_rate=0.1), "model.features: 8 saved, 16 now"),
        (small("optimizer.weight_decay=0.001"),
         "optimizer.weight_decay: 0.0005 saved, 0.001 now"),
        (small("data.augment.pad=2"), "data.augment.pad: 1 saved, 2 now"),
        (small("recipe.learning_rate=0.2"), "'learning_rate': 0.1"),
        (small("recipe.falls=((0.5,2),(1.4,2))"), "phase 0"),
    ):
        before = (folder / "metrics.jsonl").read_bytes()
        with pytest.raises(ValueError, match="another config") as caught:
            run(config, folder)
        assert key in str(caught.value), key
        assert (folder / "metrics.jsonl").read_bytes() == before


def test_a_log_without_a_checkpoint_is_replaced_only_by_the_same_run(whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole[1], folder)
    shutil.rmtree(folder / "checkpoints")
    config, log, timing = small(*SMALL_BATCHES), folder / "metrics.jsonl", folder / "timing.jsonl"
    before = [(folder / name).read_bytes() for name in bucket.LOGS]
    for other, said in (
        (small("seed=1"), "a run of another config, and no checkpoint: seed: 0 saved, 1 now"),
        (small("recipe.learning_rate=0.2"), "recipe.learning_rate: 0.1 saved, 0.2 now"),
        (config, "a run that was saved at example 3024, and no checkpoint any more"),
    ):
        with pytest.raises(Mistake, match=re.escape(said)):
            run(other, folder)
        assert [(folder / name).read_bytes() for name in bucket.LOGS] == before
    for damaged in ("", "[]", "{}"):
        (folder / "config.json").write_text(damaged)
        with pytest.raises(Mistake, match="its config.json does not say of which run"):
            run(config, folder)
    (folder / "config.json").write_bytes(before[0])
    # As it would be after a kill before the first save: of an older start nothing is left to lose.
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[: len(lines) // 2]))
    logs.append_event(timing, {"event": "start", "examples_seen": 0})
    run(config, folder)
    assert log.read_bytes() == b"".join(lines)
    shutil.rmtree(folder / "checkpoints")
    log.unlink()  # as the message says
    with pytest.raises(train.StoppedAfterPhase):
        run(small("seed=1"), folder, stop_after_phase="0")


def test_what_only_changes_examples_not_yet_seen_is_allowed_and_logged(tmp_path):
    """More epochs and a later fall: the same bits as a run that had them from its start."""
    short, changed = small(), ("recipe.epochs=2.2", "recipe.falls=((0.7,2),(1.6,2))")
    with pytest.raises(train.StoppedAfterPhase):
        run(short, tmp_path / "a", stop_after_phase="0")
    state = run(small(*changed), tmp_path / "a")
    assert_same_bits(state, run(small(*changed), tmp_path / "b"), "later fall")
    assert (tmp_path / "a/metrics.jsonl").read_bytes() == (
        tmp_path / "b/metrics.jsonl").read_bytes()
    notices = [event["text"] for event in read_events(tmp_path / "a/timing.jsonl")
               if event["event"] == "notice"]
    assert "changed: recipe.epochs: 2.0 saved, 2.2 now" in notices


SMOOTH = ("recipe.curve=cosine", "optimizer.name=adam", "recipe.learning_rate=0.01",
          "optimizer.decoupled=true", "optimizer.weight_decay=0.01", "ema=0.99",
          "limits.max_batch_size=192", "limits.growth=1.5")


@pytest.fixture(scope="module")
def smooth(tmp_path_factory):
    """A run under a cosine whose rate, betas, decay and average change; stopped on its way."""
    folder = tmp_path_factory.mktemp("smooth")
    phases = make_phases(small(*SMOOTH))
    assert len(phases) == 3
    with pytest.raises(train.StoppedAfterPhase):
        run(small(*SMOOTH), folder, stop_after_phase="1")
    return folder


def test_under_a_smooth_curve_every_update_takes_what_the_formula_says(smooth, tmp_path):
    state = run(small(*SMOOTH, "log_every_epochs=0.001"), tmp_path)
    n = small().data.train_examples
    events = read_events(tmp_path / "metrics.jsonl")
    assert len(events) == events[-1]["updates"]
    for event in events:
        start = event["examples_seen"] - event["batch_size"]
        cosine = (1 + math.cos(math.pi * start / (2 * n))) / 2
        kappa = event["batch_size"] / events[0]["batch_size"]
        assert event["learning_rate"] == pytest.approx(0.01 * cosine * kappa**0.5, rel=1e-12)
        assert event["momentum"] == pytest.approx(0.9**kappa, rel=1e-12)
    assert kappa > 1 and "test_accuracy_average" in events[-1]
    run(small(*SMOOTH), smooth)
    assert_same_bits(state, checkpoint_of(smooth, state), "continued")


def checkpoint_of(folder, like):
    """The arrays of the newest checkpoint, in the tree of a state."""
    arrays = checkpoint.load(folder)
    return jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(
        type(like)(**{name: arrays.get(name) for name in like._fields})))


@pytest.mark.parametrize(("changed", "said"), (
    ("recipe.epochs=2.2", "recipe.epochs: 2.0 saved, 2.2 now"),
    ("recipe.curve=linear", "recipe.curve: 'cosine' saved, 'linear' now"),
    ("recipe.final_share=0.1", "recipe.final_share: 0.0 saved, 0.1 now"),
    ("exchange=linear", "exchange: 'by_optimizer' saved, 'linear' now"),
    ("per_example.beta2=false", "per_example.beta2: True saved, False now"),
    ("per_example.ema=false", "the update at example"),
))
def test_a_curve_that_would_have_been_another_is_refused(smooth, changed, said):
    """Under a smooth curve even more epochs would have changed the updates so far."""
    with pytest.raises(ValueError, match="another config") as caught:
        run(small(*SMOOTH, changed), smooth)
    assert said in str(caught.value)


def test_a_function_of_the_users_that_has_changed_is_refused(tmp_path, monkeypatch):
    """It is only named in the config; and a rate that falls is one phase, whatever the function."""
    module = tmp_path / "a_curve_of_mine.py"
    module.write_text("def fall(x):\n    return 1 - x\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    settings = ("strategy=decay", "recipe.curve=a_curve_of_mine.fall")
    with monkeypatch.context() as patch:
        terminate_at(patch, 10)
        with pytest.raises(train.Preempted):
            run(small(*settings), tmp_path / "run")
    module.write_text("def fall(x):\n    return 1 - x**4\n", encoding="utf-8")
    sys.modules.pop("a_curve_of_mine")
    importlib.invalidate_caches()
    with pytest.raises(ValueError, match="a_curve_of_mine.fall was another: at example"):
        run(small(*settings), tmp_path / "run")
    module.write_text("def fall(x):\n    raise KeyError('none')\n", encoding="utf-8")
    sys.modules.pop("a_curve_of_mine")
    with pytest.raises(Mistake, match=r"fall\(0\) fails: KeyError: 'none' \(.*mine.py, line 2\)"):
        run(small(*settings), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def flat_at_first(progress):
    """A curve of a user's own."""
    return 1.0 if progress < 0.8 else (1.0 - progress) / 0.2


def test_a_longer_run_goes_on_under_a_function_that_was_the_same_so_far():
    settings = ("strategy=decay", "recipe.warmup_epochs=0.5",
                "recipe.curve=tests.storage.test_continuing.flat_at_first")
    config, longer = small(*settings), small(*settings, "recipe.epochs=3")
    for seen, differs in ((1440, False), (2832, True)):  # of 2874: where it had not fallen, and had
        saved = json.loads(json.dumps(continuing.describe_run(
            config, make_phases(config), continuing.Position(seen, seen // 48))))
        refused, allowed = continuing.changes(saved, longer, make_phases(longer))
        assert bool(refused) == differs and allowed == ["recipe.epochs: 2.0 saved, 3.0 now"]
        assert not any("was another" in text for text in refused)


def test_what_cannot_alter_the_trajectory_may_change(whole, tmp_path):
    state, _ = whole
    with pytest.raises(train.StoppedAfterPhase):
        run(small("log_every_epochs=0.3"), tmp_path, stop_after_phase="0")
    free = ("keep_checkpoints=5", "checkpoint_every_epochs=0.5", "eval_batch_size=100",
            "max_per_device_batch=512")
    assert_same_bits(run(small(*free), tmp_path), state, "free keys changed")


def test_an_interrupted_line_is_cut_and_written_again(whole, tmp_path):
    state, folder = whole
    with pytest.raises(train.StoppedAfterPhase):
        run(small(*SMALL_BATCHES), tmp_path, stop_after_phase="0")
    log = tmp_path / "metrics.jsonl"
    later = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    log.write_text(log.read_text() + json.dumps(later) + "\n" + '{"updates": 3')
    ended = run(small(*SMALL_BATCHES), tmp_path)
    assert_same_bits(ended, state, "after a half line")
    assert log.read_bytes() == (folder / "metrics.jsonl").read_bytes()


def test_a_state_that_is_not_finite_is_not_saved_on_sigterm(tmp_path, monkeypatch):
    terminate_at(monkeypatch, 3)
    with pytest.raises(train.NotFinite, match="update [12] "):
        run(small("recipe.learning_rate=1e20"), tmp_path)
    assert checkpoint.finished(tmp_path) == []
    told = read_events(tmp_path / "timing.jsonl")[-1]
    assert told["event"] == "diverged" and told["updates"] in (0, 1), told


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_ctrl_c_a_lost_terminal_and_slurms_warning_save_first(tmp_path, monkeypatch, number):
    before = signal.getsignal(number)
    terminate_at(monkeypatch, 3, number)
    with pytest.raises(train.Preempted):
        run(small(), tmp_path)
    assert checkpoint.find_newest(tmp_path).run["updates"] == 2
    assert signal.getsignal(number) is before


def test_a_loss_that_is_not_finite_stops_the_run_at_its_update(tmp_path):
    config = small("recipe.learning_rate=1e20", "checkpoint_every_epochs=0.02")
    with pytest.raises(train.NotFinite, match=r"update \d+ \(from example \d+\)") as caught:
        run(config, tmp_path)
    broke_at = int(str(caught.value).split("from example ")[1].split(")")[0])
    found = checkpoint.find_newest(tmp_path)
    assert found.path is None or found.run["examples_seen"] <= broke_at
    for event in read_events(tmp_path / "metrics.jsonl"):
        assert np.isfinite(event["train_loss"]) and event["examples_seen"] <= broke_at


def test_the_environment_changes_no_curve(tmp_path):
    """A run is its config and its workdir: what JAX reads from the environment is set for each."""
    otherwise = {
        "JAX_ENABLE_X64": "1", "JAX_THREEFRY_PARTITIONABLE": "0", "JAX_DEFAULT_PRNG_IMPL": "rbg",
        "JAX_DEFAULT_MATMUL_PRECISION": "bfloat16", "JAX_RANDOM_SEED_OFFSET": "7",
        "JAX_NUMPY_RANK_PROMOTION": "raise", "JAX_NUMPY_DTYPE_PROMOTION": "strict",
    }
    for name, environment in (("plain", {}), ("otherwise", otherwise)):
        started.end(started.start_python(
            "-m", "bigbatch.main", "--config=tests/support/small_config.py:resident",
            f"--workdir={tmp_path / name}", f"--compilation_cache={started.CACHE}", **environment))
        found = started.end(started.start_python(
            "-m", "bigbatch.evaluate", f"--workdir={tmp_path / name}", **environment))
        assert json.loads(found.splitlines()[-1])["updates"] == 9
    first, second = ((tmp_path / name / "metrics.jsonl").read_bytes()
                     for name in ("plain", "otherwise"))
    assert first == second
