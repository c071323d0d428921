"""What `bigbatch.plan` says of a config: counts, dealing, totals; without data or accelerator."""

import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys

import pytest

from bigbatch import config_files
from bigbatch.config import make_layouts, make_phases, make_recipe
from bigbatch.mistake import Mistake
from bigbatch.plan import plan
from bigbatch.planning import compare, picture, slices, tables, topology
from bigbatch.storage.logs import append_event
from tests.conftest import REPOSITORY
from tests.support import configs

# Updates at 204.8 epochs, batches and rates of the paper's CIFAR-10 curves.
CIFAR_CURVES = {
    "decay": (80_000, (128, 128, 128, 128), (0.1, 0.02, 0.004, 0.0008)),
    "hybrid": (34_750, (128, 640, 640, 640), (0.1, 0.1, 0.02, 0.004)),
    "increase": (28_891, (128, 640, 3200, 16_000), (0.1, 0.1, 0.1, 0.1)),
    "figure5_original": (80_000, (128, 128, 128, 128), (0.1, 0.02, 0.004, 0.0008)),
    "figure5_increasing_batch": (29_189, (128, 640, 3200, 5120), (0.1, 0.1, 0.1, 0.032)),
    "figure5_increased_lr": (6453, (640, 3200, 5120, 5120), (0.5, 0.5, 0.16, 0.032)),
    "figure5_increased_momentum": (2352, (3200, 5120, 5120, 5120), (0.5, 0.16, 0.032, 0.0064)),
}
WRN_16_4_PARAMETERS = 2_748_890


def run_plan(*arguments, **environment):
    done = subprocess.run(
        [sys.executable, "-m", "bigbatch.plan", *arguments], cwd=REPOSITORY, text=True,
        capture_output=True, timeout=120, env=os.environ | environment,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def assert_is_the_papers(phases, curve):
    """`phases` as a plan has them."""
    updates, batches, rates = CIFAR_CURVES[curve]
    assert abs(sum(phase["updates"] for phase in phases) - updates) <= 2
    assert tuple(phase["batch_size"] for phase in phases) == batches
    assert [phase["learning_rate"] for phase in phases] == pytest.approx(rates, rel=1e-12)


@pytest.mark.parametrize("preset", ("hybrid", "figure5_increased_momentum"))
def test_the_command_prints_the_papers_curves_as_json(preset):
    planned = json.loads(run_plan(f"--config=configs/cifar10.py:{preset}", "--format=json"))
    assert_is_the_papers(planned["phases"], preset)
    assert planned["total_updates"] == sum(phase["updates"] for phase in planned["phases"])
    assert planned["parameters"] == WRN_16_4_PARAMETERS
    first, last = planned["phases"][0], planned["phases"][-1]
    assert [phase["name"] for phase in planned["phases"]] == [
        "noise/1", "noise/5", "noise/25", "noise/125"]
    assert first["start_example"] == 0
    assert last["end_example"] == planned["total_examples"] >= 204.8 * 50_000
    for phase in planned["phases"]:
        assert phase["end_example"] - phase["start_example"] == (
            phase["updates"] * phase["batch_size"])
        assert phase["learning_rate_end"] == phase["learning_rate"]
        momentum = 0.98 if preset == "figure5_increased_momentum" else 0.9
        assert phase["momentum"] == momentum
        assert phase["noise_scale"] == pytest.approx(
            phase["learning_rate"] / (1 - momentum) * (50_000 / phase["batch_size"] - 1))


@pytest.mark.parametrize("preset", CIFAR_CURVES)
def test_every_preset_is_the_papers_curve(preset):
    phases = make_phases(configs.load("cifar10", preset))
    assert_is_the_papers([dataclasses.asdict(phase) for phase in phases], preset)


def test_a_plans_numbers_are_all_written_in_one_way():
    """Also those in its notes; a number is never on two lines, and names keep their digits."""
    config = configs.load("cifar10", "figure5_increased_momentum,recipe.falls=((60,1250),)")
    text = tables.of_plan(plan(config, devices=8))
    assert "noise/1250: batch 5 120 is over a tenth of the 50 000 training examples" in text
    bare = [word for word in re.findall(r"[\w./]*\d{4,}[\w./]*", text)
            if word != "noise/1250" and "." not in word.strip(".")]
    assert bare == []
    for line in text.splitlines():
        if line.startswith("Note") or not line.startswith(" "):
            assert len(line) <= 100
    assert not re.search(r"\d\n\d{3}\b", text)


def test_the_plan_of_a_run_that_decides_has_every_batch_that_can_come():
    config = configs.load("digits", "decay,strategy=measured,ghost_size=8,measured.stay_epochs=5")
    planned = plan(config, devices=2)
    batches = [phase["batch_size"] for phase in planned["phases"]]
    assert sorted(set(batches)) == [16, 32, 64, 128] and batches == sorted(batches)
    starts = [next(phase["start_epoch"] for phase in planned["phases"]
                   if phase["batch_size"] == batch) for batch in (16, 32, 64, 128)]
    assert all(5 <= later - before < 6 for before, later in itertools.pairwise(starts))
    assert planned["total_updates"] < planned["constant_batch"]["updates"]  # which never grows
    text = " ".join(tables.of_plan(planned).split())
    assert "decides when its batch grows. These are the phases of one that grows as soon" in text


def test_the_page_on_schedules_has_what_the_planner_prints():
    page = (REPOSITORY / "docs/schedules.md").read_text(encoding="utf-8")
    _, command, block = re.split(r"^\$ .venv/bin/python -m bigbatch.plan (.*)$", page, flags=re.M)
    shown = [line for line in block.partition("```")[0].splitlines() if line not in ("", "...")]
    printed = iter(run_plan(*command.split(), "--devices=1").splitlines())
    assert len(shown) > 10 and [line for line in shown if line not in printed] == []  # in order


@pytest.mark.parametrize("family", ("cifar10", "digits"))
def test_a_familys_docstring_has_the_updates_that_the_planner_gives(family):
    module = config_files.load_file(configs.CONFIGS / f"{family}.py")
    header, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in module.__doc__.splitlines() if line.startswith("|")
    ]
    assert [row[0] for row in rows] == list(module.PRESETS)
    for row in rows:
        planned = plan(module.get_config(row[0]), devices=1)
        written = int(row[header.index("updates")].replace(" ", ""))
        assert planned["total_updates"] == written, f"{family}:{row[0]}"
        if row[0] == "decay":  # falls paid by the rate change no count
            assert planned["constant_batch"]["updates"] == written
        if "batches" in header:
            batches = [int(batch) for batch in row[header.index("batches")].split(",")]
            assert sorted({phase["batch_size"] for phase in planned["phases"]}) == batches


@pytest.mark.parametrize(("optimizer", "momentum", "rate"), (
    ("momentum", 0.9, 0.1), ("nesterov", 0.9, 0.1), ("sgd", 0.0, 0.1), ("adam", 0.9, 0.001),
))
def test_figures_2_to_4_keep_batches_and_updates_under_every_optimizer(optimizer, momentum, rate):
    for preset in ("decay", "hybrid", "increase"):
        config = configs.load("cifar10", f"{preset},optimizer={optimizer}")
        assert config.optimizer.name == optimizer
        phases = make_phases(config)
        updates, batches, rates = CIFAR_CURVES[preset]
        assert abs(sum(phase.updates for phase in phases) - updates) <= 2
        assert tuple(phase.batch_size for phase in phases) == batches
        # Figure 4: Adam's rates are a hundredth of the others'.
        assert [phase.learning_rate for phase in phases] == pytest.approx(
            [rate / 0.1 * usual for usual in rates], rel=1e-12)
        assert {phase.momentum for phase in phases} == {momentum}


def dealt(argument, devices):
    """(ghost batches, passes, slots a device, idle share) of each phase."""
    config = configs.load("cifar10", argument)
    return [
        (layout.ghosts, layout.microbatches, layout.slots, layout.idle_share)
        for layout in make_layouts(config, make_phases(config), devices)
    ]


def test_ghost_batches_are_dealt_evenly_where_they_can_be():
    # Ghost batches of 128: 1, 5, 25, 125 in an update; 8 of them fit in 1024 examples a pass.
    large = "increase,max_per_device_batch=1024"
    assert dealt(large, 1) == [(1, 1, 1, 0), (5, 1, 5, 0), (25, 5, 5, 0), (125, 25, 5, 0)]
    assert dealt(large, 5) == [(1, 1, 1, pytest.approx(4 / 5)), (5, 1, 1, 0), (25, 1, 5, 0),
                               (125, 5, 5, 0)]
    # 5 on 8 devices: 3 of 8 slots are idle.
    assert dealt(large, 8)[1] == (5, 1, 1, pytest.approx(3 / 8))
    # As the presets have it, in passes of 640.
    assert dealt("increase", 1) == [(1, 1, 1, 0), (5, 1, 5, 0), (25, 5, 5, 0), (125, 25, 5, 0)]
    assert dealt("increase,max_per_device_batch=128", 1)[2] == (25, 25, 1, 0)
    assert dealt("increase,microbatches=5", 1)[2] == (25, 5, 5, 0)


def test_8192_in_ghosts_of_64_fill_at_most_128_devices():
    argument = ("decay,strategy=constant,recipe.batch_size=8192,ghost_size=64,"
                "max_per_device_batch=64")
    assert dealt(argument, 128) == [(128, 1, 1, 0)]
    assert dealt(argument, 256) == [(128, 1, 1, 0.5)]


def test_devices_change_no_phase():
    one, many = (plan(configs.tiny(), devices)["phases"] for devices in (1, 7))
    dealing = {"devices", "ghost_batches", "microbatches", "slots", "idle_share"}
    for before, after in zip(one, many, strict=True):
        assert {key: before[key] for key in before.keys() - dealing} == {
            key: after[key] for key in after.keys() - dealing}


def test_parameters_are_counted_by_hand_and_none_is_made():
    # conv 3x3 1 -> 16; groups of 16, 32, 64 with one block each; 10 classes.
    block = 2 * 16 + 9 * 16 * 16 + 2 * 16 + 9 * 16 * 16
    for inputs, outputs in ((16, 32), (32, 64)):
        block += 2 * inputs + 9 * inputs * outputs + 2 * outputs + 9 * outputs * outputs
        block += inputs * outputs
    expected = 9 * 16 + block + 2 * 64 + 64 * 10 + 10
    for dtype in ("float32", "bfloat16", "float64"):
        assert plan(configs.tiny(f"dtype={dtype}"), 1)["parameters"] == expected
    # 10^12 numbers a layer: more than memory holds.
    assert plan(configs.tiny("model.width=20000"), 1)["parameters"] > 10**12


def test_a_plan_fits_json_and_says_what_a_constant_batch_would_take():
    planned = plan(configs.load("cifar10", "figure5_increased_lr"), 8)
    assert json.loads(json.dumps(planned)) == planned
    # The batch before it was scaled up: the paper's original schedule.
    assert planned["constant_batch"] == {"batch_size": 128, "updates": 80_000}
    assert len(planned["notes"]) == 3  # of the limit, and of two batches over N/10
    assert planned["total_epochs"] == planned["total_examples"] / 50_000


def test_of_a_task_with_tokens_the_table_shows_both_units():
    config = configs.load("cifar10", "figure5_increased_lr")
    planned = plan(config, 8)
    assert planned["tokens_per_example"] is None and "token" not in tables.of_plan(planned)
    text = tables.of_plan(planned | {"tokens_per_example": 1024})
    assert max(map(len, text.splitlines())) <= 100
    assert "parameters.\n1.049e10 tokens, 1 024 an example." in text
    rows = [re.split(" {2,}", line) for line in text.splitlines() if re.match(r"\d  ", line)]
    ends = [float(row[3]) for row in rows[: len(planned["phases"])]]
    assert ends == pytest.approx(
        [1024 * phase["end_example"] for phase in planned["phases"]], rel=1e-3)


def test_the_table_shows_every_phase_and_fits_a_terminal():
    config = configs.load(
        "cifar10", "figure5_increased_lr,recipe.warmup_epochs=5,recipe.warmup_learning_rate=0.1")
    text = tables.of_plan(plan(config, 8))
    assert max(map(len, text.splitlines())) <= 100
    rows = [re.split(" {2,}", line) for line in text.splitlines() if re.match(r"\d  ", line)]
    assert [row[0] for row in rows] == [*"01234", *"01234"]  # the phases, then their dealing
    # 391 x 640 examples; 0.1/(1 - 0.9) x (50 000/640 - 1); 640/(50 000 (1 - 0.9)).
    assert rows[0] == ["0", "warmup", "0.00 to 5.00", "640", "391", "0.1 to 0.5", "0.9", "77.13",
                       "78.13", "0.128"]
    assert rows[4][1:] == ["noise/125", "160.08 to 204.83", "5 120", "437", "0.032", "0.9", "2.805",
                           "3.125", "1.02"]
    # 640 is 5 ghost batches on 8 devices; the last phase is 40, and ends 1280 past 204.8 epochs.
    assert rows[5] == ["0", "0", "250 240", "240", "5", "8", "1", "1", "37.5%"]
    assert rows[9] == ["4", "8 003 840", "10 241 280", "1 280", "40", "8", "1", "5"]
    said = " ".join(text.split())
    for part in ("6 454 updates", "10 241 280 examples", "epochs of 50 000", "2 748 890 parameters",
                 "A constant batch of 128 (the strategy decay) takes 80 000 updates: 12.4 times",
                 "Note: noise/125", "10.2%"):
        assert part in said


def test_a_plan_without_growth_claims_no_saving():
    assert "A constant batch" not in tables.of_plan(plan(configs.load("digits", "decay"), 1))


def test_what_training_would_refuse_is_refused():
    for argument, message in (
        ("decay,limits.max_batch_size=100", "limits.max_batch_size is 100"),
        ("decay,max_per_device_batch=64", "max_per_device_batch is 64"),
        ("decay,model.depth=7", "model.depth is 7"),
        ("decay,dtype=float16", "config.dtype is 'float16'"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            plan(configs.load("cifar10", argument), 1)


TRIAL = """
import runpy, sys
sys.argv = ["plan", "--config=configs/cifar10.py:increase"]
try:
    runpy.run_module("bigbatch.plan", run_name="__main__")
except SystemExit as end:
    assert not end.code
import jax
assert jax.default_backend() == "cpu"
unneeded = {"tensorflow", "tensorflow_datasets", "sklearn", "orbax", "grain", "tensorboardX"}
print("imported:", sorted(unneeded & sys.modules.keys()))
"""


def test_planning_needs_no_accelerator_and_loads_no_data():
    # With a platform that is not here (or is busy), whatever touches the accelerator would fail.
    done = subprocess.run(
        [sys.executable, "-c", TRIAL], cwd=REPOSITORY, text=True, capture_output=True, timeout=120,
        env=os.environ | {"JAX_PLATFORMS": "tpu"},
    )
    assert done.returncode == 0, done.stderr
    assert "28 891 updates" in done.stdout
    assert done.stdout.splitlines()[-1] == "imported: []"


def test_piped_output_is_the_table_itself():
    text = run_plan("--config=configs/digits.py:increase", "--devices=3", COLUMNS="20")
    assert text == tables.of_plan(plan(configs.load("digits", "increase"), 3)) + "\n"


def test_the_picture_shows_rate_batch_and_noise(tmp_path):
    """A cosine of the paper's recipe: the batch's bars rise, and those of the noise fall."""
    config = configs.load("cifar10", "increase,curve=cosine")
    rate, batch, noise, below = plan(config, 1)["picture"].splitlines()
    for line, name, ends in ((rate, "rate", "to 0.09999"), (batch, "batch", "128 to 4 096"),
                             (noise, "noise", "to 0.9999")):
        assert line.startswith(name) and line.endswith(ends)
    bars = [line.split("  ")[1].strip() for line in (batch, noise)]
    assert list(bars[0]) == sorted(bars[0]) and bars[0][0] != bars[0][-1]
    assert list(bars[1]) == sorted(bars[1], reverse=True) and bars[1][0] != bars[1][-1]
    assert below.split() == ["epoch", "0", "epoch", "204.8"]
    without = plan(configs.load("cifar10", "increase,curve=cosine,exchange=none"), 1)["picture"]
    assert "noise" not in without
    picture.draw(tmp_path / "plan.png", "a title", make_recipe(config), make_phases(config))
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(Mistake, match="--picture=.*cannot be written"):
        picture.draw(tmp_path / "no" / "plan.png", "", make_recipe(config), make_phases(config))


def test_the_plan_says_what_batches_save_at_most_and_what_they_save():
    planned = plan(configs.load("cifar10", "increase,curve=cosine"), 1)
    assert planned["saved"] == {
        "at_most": pytest.approx(0.5), "of": 80_000, "batch_size": 128,
        "share": pytest.approx(1 - planned["total_updates"] / 80_000)}
    assert "without limits and rounding would save 50.0%; these save 37.6%." in " ".join(
        tables.of_plan(planned).split())
    noise = [phase["noise"] for phase in planned["phases"]]
    assert noise == pytest.approx([1 / 2**index for index in range(6)], rel=2e-3)


SLICES = [topology.parse(name) for name in ("v5litepod-16", "v5litepod-64")]


def compared(monkeypatch, seconds_an_example):
    """`compare` where an update takes seconds by its examples and devices."""
    def compile_for(config, phases, chosen, *_):
        seconds = sum(phase.updates * seconds_an_example(phase.batch_size / found.devices)
                      for phase, found in zip(phases, chosen, strict=True))
        return {"fits": True, "seconds_at_least": seconds,
                "chip_hours_at_least": seconds * max(found.chips for found in chosen) / 3600}

    monkeypatch.setattr(slices, "compile_for", compile_for)
    config = configs.load("imagenet_resnet50", "batch_8k,limits.max_batch_size=65536")
    return compare.compare(config, ["decay", "increase"], SLICES)


def test_strategies_are_compared_on_each_slice_and_on_one_that_grows(monkeypatch):
    rows = compared(monkeypatch, lambda examples: examples / 1000)
    assert [(row["strategy"], row["slice"]) for row in rows] == [
        ("decay", "v5litepod-16"), ("decay", "v5litepod-64"),
        ("increase", "v5litepod-16"), ("increase", "v5litepod-64"),
        ("increase", "v5litepod-16 then v5litepod-64")]
    # Time in proportion to examples: a larger batch is no gain, and it is said.
    assert rows[0]["seconds"] == pytest.approx(rows[2]["seconds"], rel=0.01)
    said = compare.where_fewer_updates_are_no_gain(rows)
    assert len(said) == 2
    assert "fewer updates are not less time there" in " ".join(said[0].split())
    # All time in what an update takes whatever its size: as many times fewer as there are updates.
    rows = compared(monkeypatch, lambda examples: 1.0)
    assert rows[2]["seconds"] / rows[0]["seconds"] == pytest.approx(
        rows[2]["updates"] / rows[0]["updates"])
    assert compare.where_fewer_updates_are_no_gain(rows) == []
    assert [row["unbeaten"] for row in rows] == [False, False, True, False, False]


def test_a_slice_grows_where_devices_keep_their_examples():
    phases = make_phases(configs.load("cifar10", "increase"))  # 128, 640, 3200, 16000
    assert [found.name for found in compare.growing(phases, SLICES)] == [
        "v5litepod-16", "v5litepod-64", "v5litepod-64", "v5litepod-64"]


def test_updates_are_compared_without_slices_and_a_wrong_name_is_refused():
    config = configs.load("cifar10", "decay")
    rows = compare.compare(config, ["decay", "hybrid", "increase"], [])
    assert [(row["strategy"], row["updates"], row["seconds"]) for row in rows] == [
        ("decay", 80_000, None), ("hybrid", 34_751, None), ("increase", 28_891, None)]
    with pytest.raises(Mistake, match="--compare names 'grow'; allowed are constant"):
        compare.compare(config, ["grow"], [])


# --- a run's measured noise scale ----------------------------------------------------------------
def test_the_measured_scale_of_a_run_stands_beside_the_batch_of_each_phase(tmp_path):
    """Both parts are averaged over a phase's epochs, and divided afterwards."""
    config = configs.tiny("recipe.falls=((1,2),)")
    parts = {0.2: (2.0, 100.0), 0.9: (-1.0, 300.0), 1.2: (4.0, 100.0), 1.5: (None, None)}
    for epoch, (square, trace) in parts.items():
        append_event(tmp_path / "metrics.jsonl", {
            "epoch": epoch, "noise_gradient_square": square, "noise_trace": trace})
    planned = plan(config, 1, tmp_path)
    assert [phase["measured_scale"] for phase in planned["phases"]] == [400.0, 25.0]
    assert [re.search(r"the batch of \d+ in phase \S+ is over 2 times", text)[0]
            for text in planned["notes"] if "measured" in text] == [
                "the batch of 96 in phase noise/2 is over 2 times"]
    text = tables.of_plan(planned)
    assert "measured" in text.splitlines()[0] and max(map(len, text.splitlines())) <= 100
    # By all parameters where the run has that, and not everywhere then.
    append_event(tmp_path / "metrics.jsonl", {
        "epoch": 1.9, "noise_full_gradient_square": 1.0, "noise_full_trace": 120.0})
    planned = plan(config, 1, tmp_path)
    assert [phase["measured_scale"] for phase in planned["phases"]] == [None, 120.0]
    with pytest.raises(Mistake, match="there is no measured noise scale in a metrics.jsonl"):
        plan(config, 1, tmp_path / "nothing")
