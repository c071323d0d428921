"""Branches are ordinary runs that share their past with the run they come from."""

import itertools
import json
import random
import shutil

import jax
import numpy as np
import pytest

from bigbatch import branch, config_files, schedule, train
from bigbatch.branching import branches, results
from bigbatch.config import make_phases, make_recipe
from bigbatch.job.devices import make_mesh
from bigbatch.mistake import Mistake
from bigbatch.schedule.deciding import Growth
from bigbatch.storage import checkpoint, continuing
from bigbatch.storage.logs import append_event, read_events
from tests.storage.test_continuing import terminate_at
from tests.support import quadratic, started
from tests.support.configs import tiny

# The batch of the quadratic beyond which its loss is higher by half of what it is.
MARGIN = 0.5 * quadratic.mean_loss(1)
CRITICAL = next(factor for factor in np.arange(1, 40, 0.01)
                if quadratic.mean_loss(factor) - quadratic.mean_loss(1) > MARGIN)
STRETCH = "8192 examples"


def train_quadratic(seed, folder):
    """A run from an optimum of its own, long past the 20 updates that it takes to forget it."""
    config = quadratic.get_config(str(seed))
    config.recipe.epochs = "9216 examples"
    train.train_and_evaluate(config, folder, show=False)


def branched(folder, factors, **options):
    """The run's branches, trained to their end, and what they say."""
    found = branch.make_branches([str(folder)], "1024 examples", factors, STRETCH, **options)
    branch.train_branches(found)  # those that are not at their end
    return found, branch.compare(found, MARGIN)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of the quadratic, its branches by the command, and what it says."""
    folder = tmp_path_factory.mktemp("run")
    train_quadratic(0, folder)
    shown = started.end(started.start_python(
        "-m", "bigbatch.branch", f"--workdir={folder}", "--at=1024 examples", "--factors=4,16",
        f"--for={STRETCH}", f"--margin={MARGIN}", f"--compilation_cache={started.CACHE}",
        devices=len(jax.devices())))
    judged = json.loads((folder / "branches/1024/branches.json").read_text())
    assert results.table(judged) in shown
    assert (folder / "branches/1024/branches.png").read_bytes().startswith(b"\x89PNG")
    return folder, branched(folder, (4, 16))[0], judged


def assert_same_bits(folder, other, examples_seen):
    one, two = (checkpoint.load(path, examples_seen) for path in (folder, other))
    assert all(leaf.tobytes() == twin.tobytes() for leaf, twin in zip(
        jax.tree.leaves(one), jax.tree.leaves(two), strict=True))


def test_the_factor_1_leaves_the_bits_of_the_run_itself(run):
    folder, (first, *others), _ = run
    assert first.factor == 1
    assert_same_bits(first.folder, folder, first.stretch.end)
    for other in others:
        with pytest.raises(AssertionError):
            assert_same_bits(other.folder, folder, first.stretch.end)


@pytest.mark.parametrize("split", ["optimizer", "parameters"])
def test_a_run_whose_state_is_in_pieces_is_branched(split, tmp_path, monkeypatch):
    """On four devices; with its optimizer's state, and with one that has seen nothing."""
    for module in (train, branches):
        monkeypatch.setattr(module, "make_mesh", lambda shards=0: make_mesh(
            jax.devices()[:4], shards))
    config = quadratic.get_config()
    config.optimizer.name, config.recipe.momentum = "momentum", 0.9
    config.recipe.update({"learning_rate": 0.005, "epochs": "1280 examples"})
    config.sharding.update({split: True, "smallest": 1})
    train.train_and_evaluate(config, tmp_path, show=False)
    before, ends = checkpoint.load(tmp_path, 1024), []
    for reset in (False, True):
        found = branch.make_branches(
            [str(tmp_path)], "1024 examples", (2,), "256 examples", tmp_path / str(reset),
            reset=reset)
        for one in found:
            begins = checkpoint.load(one.folder, 1024)
            expected = jax.tree.map(np.zeros_like, before["opt_state"]) if reset else (
                before["opt_state"])
            assert np.any(before["opt_state"][1]["trace"]["w"])
            jax.tree.map(np.testing.assert_array_equal, begins["opt_state"], expected)
            np.testing.assert_array_equal(begins["params"]["w"], before["params"]["w"])
        branch.train_branches(found)
        ends += [checkpoint.load(one.folder, 1280)["params"]["w"] for one in found]
        if not reset:
            assert_same_bits(found[0].folder, tmp_path, 1280)
    assert len({end.tobytes() for end in ends}) == len(ends) == 4


@pytest.mark.parametrize(("flag", "told"), [
    ("--for=4096 examples", "give the branches another folder by --output"),
    ("--margin=nan", "--margin is nan; it must")])
def test_a_refused_comparison_leaves_the_last_ones_result(run, flag, told):
    folder, _, judged = run
    shown = started.end(started.start_python(
        "-m", "bigbatch.branch", f"--workdir={folder}", "--at=1024 examples", "--factors=4,16",
        f"--for={STRETCH}", flag, devices=len(jax.devices())), status=2)
    assert told in shown and "Traceback" not in shown
    assert json.loads((folder / "branches/1024/branches.json").read_text()) == judged


def test_the_critical_batch_of_a_quadratic_is_found_between_two_factors(run):
    _, found, judged = run
    assert (judged["critical_batch"], judged["worse_batch"]) == (4 * 8, 16 * 8)  # CRITICAL is 14
    assert judged["paired_over"] == "evaluations"
    rows = {row["factor"]: row for row in judged["factors"]}
    assert rows[4]["verdict"] == "as good" and rows[16]["verdict"] == "worse"
    exact = quadratic.mean_loss(4) - quadratic.mean_loss(1)
    assert abs(rows[4]["difference"] - exact) < 0.05 * quadratic.mean_loss(1)
    assert f"up to a batch of {judged['critical_batch']}" in judged["verdict"]
    assert [row["command"] for row in judged["branches"]] == [one.command for one in found]
    for one in found:  # all see the same examples, and are evaluated after as many of them
        events = read_events(one.folder / "metrics.jsonl")
        seen = [event["examples_seen"] for event in events if "test_loss" in event]
        assert seen == list(range(1024 + 512, 9216 + 1, 512))
        assert {event["batch_size"] for event in events} == {8 * one.factor}
        assert events[0]["learning_rate"] == pytest.approx(0.05 * one.factor)


@pytest.mark.long
def test_the_critical_batch_is_found_within_a_factor_of_2_in_95_percent_of_40_seeds(tmp_path):
    found = []
    for seed in range(40):
        folder = tmp_path / str(seed)
        train_quadratic(seed, folder)
        found.append(branched(folder, (2, 4, 8, 16, 32))[1]["critical_batch"] / 8)
    within = [CRITICAL / 2 < factor < CRITICAL * 2 for factor in found]
    assert sum(within) >= 38, found


def test_a_branch_that_was_stopped_is_continued_by_the_ordinary_command(run, tmp_path, monkeypatch):
    folder, whole, _ = run
    one = branch.make_branches(
        [str(folder)], "1024 examples", (4,), "2048 examples", folder=tmp_path)[1]
    with monkeypatch.context() as patch:
        terminate_at(patch, 20)
        with pytest.raises(train.Preempted):
            branch.train_branches([one])
    assert results.losses_of(one) is None
    with pytest.raises(Mistake, match="is not at its end: python -m bigbatch.main"):
        branch.compare([one], MARGIN)
    flags = dict(word.lstrip("-").split("=") for word in one.command.split()[3:])
    with pytest.raises(train.StoppedAfterPhase):
        train.train_and_evaluate(
            config_files.load_config(flags["config"]), flags["workdir"], flags["stop_after_phase"],
            show=False)
    twin = next(other for other in whole if other.factor == 4)
    assert_same_bits(one.folder, twin.folder, one.stretch.end)
    assert results.losses_of(one) is not None
    before = (one.folder / "timing.jsonl").read_bytes()
    branch.train_branches([one])  # which is at its end
    assert (one.folder / "timing.jsonl").read_bytes() == before


def test_a_loss_that_is_not_finite_is_worse_and_no_reference(run, tmp_path):
    folder, found, _ = run
    made = shutil.copytree(folder / "branches/1024", tmp_path / "made")
    found = [one._replace(folder=made / one.folder.name) for one in found]

    def lose(log):
        """The log of a branch whose last evaluation, and no update, was not finite."""
        *events, last = read_events(log)
        log.unlink()
        for event in (*events, last | {"test_loss": np.nan}):
            append_event(log, event)

    lose(made / "x4/metrics.jsonl")
    judged = branch.compare(found, MARGIN)
    assert json.loads(json.dumps(judged, allow_nan=False)) == judged
    row = judged["factors"][1]
    assert (row["factor"], row["verdict"], row["loss"]) == (4, "worse", None)
    assert judged["worse_batch"] == 4 * 8 and "diverged" in results.table(judged)
    lose(made / "x1/metrics.jsonl")
    with pytest.raises(Mistake, match=r"made/x1.* the run itself diverges .* earlier .*--for"):
        branch.compare(found, MARGIN)


# --- the path of the batches, without any training ------------------------------------------------
RUNS = {
    "decay": ("strategy=decay",),
    "constant": ("strategy=constant", "recipe.warmup_epochs=0.4"),  # with falls that it leaves out
    "constant, with a curve": ("strategy=constant", "recipe.curve=cosine"),
    "increase": (),
    "warm-up": ("recipe.warmup_epochs=0.4", "recipe.warmup_learning_rate=0.01"),
    "ramp": ("ramp=((0.3,3),)",),
    "growing ramp": ("ramp=((0.3,3),(0.9,2))", "ghost_size=8"),
    "cosine": ("recipe.curve=cosine", "limits.growth=1.5"),
    "wsd": ("recipe.curve=wsd", "recipe.tail_share=0.5"),
    "by hand": ("strategy=by_hand", "by_hand=((0.5,96),('1300 examples',48))"),
    "adam": ("optimizer.name=adam", "recipe.learning_rate=0.01"),
    "decided": ("strategy=measured", "measured.stay_epochs=1.1", "ghost_size=8"),
    "scaled up": ("scale_up.learning_rate=2", "ghost_size=16"),
}


def updates_of(config, phases):
    """(start, end, rates) of every update."""
    recipe = make_recipe(config)
    return [(start, end, schedule.take_rates(recipe, phases, phase, start, end))
            for phase in phases for start, end in schedule.spans([phase], 0)]


@pytest.mark.parametrize("name", RUNS)
def test_a_branch_is_the_run_but_for_its_stretch(name, tmp_path):
    draw = random.Random(name)
    config = tiny("recipe.epochs=4", *RUNS[name])
    phases = make_phases(config)
    own = updates_of(config, phases)
    decisions = tuple((phase.start_example, phase.batch_size)  # read where the run has decided
                      for before, phase in itertools.pairwise(phases)
                      if phase.batch_size != before.batch_size)
    boundaries = [phase.end_example for phase in phases[:-1]]
    anywhere = [end for _, end, _ in draw.sample(own[:-1], 6)]
    tried = 0
    for at in boundaries + anywhere:
        run = continuing.describe_run(
            config, phases, continuing.Position(
                at, sum(end <= at for _, end, _ in own), growth=Growth(decisions)))
        try:
            first, other = branches.plan_branches("run", run, "0.2", (1, 2), 1, tmp_path)
        except Mistake as mistake:  # a batch that changes within the stretch, or the run's end
            assert "goes past" in str(mistake)
            continue
        tried += 1
        start, end, every, batch = first.stretch
        assert start == at and (end - start) % every == every % (2 * batch) == 0
        assert updates_of(first.config, make_phases(first.config)) == own
        for one in (first, other):
            planned = make_phases(one.config)
            refused, _ = continuing.changes(json.loads(json.dumps(run)), one.config, planned)
            assert refused == []
            assert planned[int(one.last_phase)].end_example == end
            for begins, ends, _ in updates_of(one.config, planned):
                if start <= begins < end:
                    assert ends - begins == batch * one.factor
        outside = [[update for update in updates if not start <= update[0] <= end]
                   for updates in (own, updates_of(other.config, make_phases(other.config)))]
        assert outside[0] == outside[1]
    assert tried >= 3


def test_what_cannot_be_branched_is_told(run, tmp_path):
    folder, _, _ = run

    def make(at="1024 examples", factors=(2,), length=STRETCH, source=folder):
        return branch.make_branches([str(source)], at, factors, length, tmp_path)

    for wrong, told in (
        ({"at": "1040 examples"}, r"example 1040 .* are some at the examples 1024 \(epoch 0.06"),
        ({"at": "soon"}, "--at is 'soon'; it must be"),
        ({"length": "1 epochs"}, "up to 16384 .* goes past the run's end at example 9216"),
        ({"length": "0"}, "--for is '0'; it must be over 0"),
        ({"at": ""}, r"--at is missing, .* the run's end, .* earlier ones at: 1024 \(ep"),
        ({"at": "9216 examples"}, "the run is over at example 9216"),
        ({"factors": ()}, r"--factors is \[1\]; it must have"),
        ({"source": tmp_path / "none"}, "has no checkpoint: no run was made there"),
    ):
        with pytest.raises(Mistake, match=told):
            make(**wrong)
    copied = shutil.copytree(folder, tmp_path / "copied")
    for second, told in ((folder, "a run is named twice"), (copied, "both have the seed"),
                         ("", "a name between commas is missing")):
        with pytest.raises(Mistake, match=told):
            branch.make_branches(
                [str(folder), str(second)], "1024 examples", (2,), STRETCH, tmp_path / "made")
    shutil.rmtree(copied)
    other = tmp_path / "other"  # of another batch: its stretch would be another
    config = quadratic.get_config("1")
    config.recipe.update({"batch_size": 16, "epochs": "2048 examples"})
    train.train_and_evaluate(config, other, show=False)
    with pytest.raises(Mistake, match="with a batch of 16, and .* from 1024 to 2048 with 8: all"):
        branch.make_branches(
            [str(folder), str(other)], "1024 examples", (2,), "1024 examples", tmp_path / "made")
    made = shutil.copytree(folder / "branches/1024", tmp_path / "made")
    before = {file: file.read_bytes() for file in made.rglob("*.json*")}
    for source, length, options, told in (
        (folder, "4096 examples", {}, "end: 9216 there, 5120 now; every: 512 there, 256 now"),
        (folder, STRETCH, {"reset": True}, "reset_optimizer: False there, True now"),
        (other, "1024 examples", {}, "run.recipe.batch_size: 8 there, 16 now"),
    ):
        with pytest.raises(Mistake, match=f"made/x1 holds another .*{told}.* by --output"):
            branch.make_branches(
                [str(source)], "1024 examples", (4, 16), length, made, **options)
    assert before == {file: file.read_bytes() for file in before}
    for damaged in ("", "[]", None):
        if damaged is None:  # only the log is left of another run
            (made / "x1/branch.json").unlink()
            shutil.rmtree(made / "x1/checkpoints")
        else:
            (made / "x1/branch.json").write_text(damaged)
        with pytest.raises(Mistake, match="no branch.json says which branch it is.* by --output"):
            branch.make_branches([str(folder)], "1024 examples", (4, 16), STRETCH, made)
    shutil.rmtree(made)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


