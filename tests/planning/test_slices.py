"""Plans for slices of Cloud TPU, by the TPU's own compiler."""

import contextlib
import json
import math
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clu import parameter_overview
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from bigbatch.config import make_phases
from bigbatch.job import chips, devices
from bigbatch.plan import plan
from bigbatch.planning import compare, compiled, slices, tables, topology
from bigbatch.update import network
from experiments.slices import PRESETS, SLICES, table
from tests.conftest import REPOSITORY
from tests.support import configs, small_language
from tests.support.tables import rows_of


@pytest.fixture(scope="module")
def libtpu():
    """The TPU compiler."""
    if not topology.LIBTPU.exists():
        pytest.skip(f"needs the TPU compiler as {topology.LIBTPU} (make .tpu/installed)")


COMPILATIONS = []  # an entry for each that this process has made
jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: COMPILATIONS.append(event) if "backend_compile" in event else None)


@pytest.fixture(scope="module")
def pod(libtpu, tmp_path_factory):
    """The tiny config planned for half a pod, from its second phase on a whole one."""
    config, folder = configs.tiny(), tmp_path_factory.mktemp("plans")
    phases, before = make_phases(config), len(COMPILATIONS)
    found = slices.parse("v2-256,1=v2-512", phases)
    told = slices.compile_for(config, phases, found, folder)
    assert len(COMPILATIONS) > before
    return config, phases, found, folder, told


pytestmark = pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")


# Cloud TPU's documentation: chips, shape; and how many devices JAX shows.
@pytest.mark.parametrize(("name", "shape", "devices"), (
    ("v2-8", (2, 2), 8), ("v2-256", (8, 16), 256), ("v2-512", (16, 16), 512),
    ("v3-32", (4, 4), 32), ("v3-2048", (32, 32), 2048), ("v4-8", (2, 2, 1), 4),
    ("v4-16", (2, 2, 2), 8), ("v4-32", (2, 2, 4), 16), ("v4-128", (4, 4, 4), 64),
    ("v5litepod-1", (1, 1), 1), ("v5litepod-8", (2, 4), 8), ("v5litepod-256", (16, 16), 256),
    ("v5p-8", (2, 2, 1), 4), ("v6e-64", (8, 8), 64), ("v2:16x16", (16, 16), 512),
    ("v5e:4x8", (4, 8), 32), ("v4:2x2x1", (2, 2, 1), 4),
))
def test_a_name_is_a_slice(libtpu, name, shape, devices):
    found = topology.parse(name)
    assert (found.shape, found.devices) == (shape, devices)
    assert topology.make_mesh(found).size == devices


@pytest.mark.parametrize(("name", "said"), (
    ("v2", "'v2'; a slice is v2-256"), ("v9-8", "Known are v2, v3"), ("v2-6", "8, 16, 32"),
    ("v5p:4x4", "3 dimensions"), ("v2-256,512", "noise/4=512"), ("v2-8,noise/7=v2-16", "noise/7"),
))
def test_what_is_no_slice_is_refused(name, said):
    with pytest.raises(ValueError, match=said):
        slices.parse(name, make_phases(configs.tiny()))


def test_a_slice_holds_from_its_phase_on():
    phases = make_phases(configs.tiny())
    found = slices.parse("v2-8,noise/2=v2-32,2=v3-8", phases)
    assert [one.name for one in found] == ["v2-8", "v2-32", "v3-8"]


@pytest.mark.parametrize("name", chips.TPUS)
def test_a_devices_memory_and_clock_are_the_compilers(libtpu, name):
    """It says how much there is when it refuses; and it counts a matrix product near the peak."""
    found = topology.Slice("", (2, 2) if chips.TPUS[name].dimensions == 2 else (2, 2, 1),
                           chips.TPUS[name])
    sharding = NamedSharding(topology.make_mesh(found), P())

    def compile_product(dtype, *shape):
        array = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        return jax.jit(lambda array: array @ array).lower(array).compile()

    with pytest.raises(jax.errors.JaxRuntimeError) as error:
        compile_product(np.float32, 2**17, 2**17)
    available = float(str(error.value).partition("available HBM (")[2].partition("G")[0])
    assert found.kind.memory_bytes == int(available * chips.GIB)
    peak = {"v2": 22.5, "v3": 61.5, "v4": 275, "v5litepod": 197, "v5p": 459, "v6e": 918}[name]
    text = compile_product(jnp.bfloat16, 2048, 2048).as_text()
    seconds = compiled.estimated_seconds(text, found.kind.clock_hertz)
    assert 0.5 < 2 * 2048**3 / (peak * 1e12) / seconds < 1.05, "the share of the published peak"


def test_options_in_the_environment_are_another_answer(libtpu, monkeypatch, tmp_path):
    found = topology.parse("v2-8")
    mesh = topology.make_mesh(found)
    lowered = jax.jit(lambda x: x + 1).lower(
        jax.ShapeDtypeStruct((8,), jnp.float32, sharding=devices.replicated(mesh)))
    for options, answers in (("", 1), ("--xla_tpu_scoped_vmem_limit_kib=12288", 2), ("", 2)):
        monkeypatch.setenv("LIBTPU_INIT_ARGS", options)
        compiled.measure(lowered, found.kind, mesh, tmp_path)
        assert len(list(tmp_path.iterdir())) == answers


def test_text_of_a_program_is_read():
    text = (
        "%a = f32[8,4]{1,0:T(8)} all-reduce(%x), channel_id=1\n"
        "%b = (f32[3]{0}, bf16[5]{0}) all-reduce-start(%x, %y), channel_id=2\n"
        "%c = (f32[3]{0}, bf16[5]{0}) all-reduce-done(%b)\n"
        "%d = pred[7]{0} all-gather(%z), dimensions={0}\n"
        "ROOT %e = f32[] add(%all-reduce, %all-gather)\n"
    )
    assert compiled.collectives(text) == {"all-reduce": [2, 128 + 12 + 10], "all-gather": [1, 7]}


def numbers_reduced(config):
    """Gradients, statistics, and eight scalars.

    These are the sums of loss, correct and weight, the examples, the ghost batches that count, and
    for the noise scale by the norms squares, squared weights and number of the copies.
    """
    params, statistics = jax.eval_shape(network.build(config).init, 0)
    return (parameter_overview.count_parameters(params)
            + parameter_overview.count_parameters(statistics) + 8)


def test_an_update_is_one_reduction_on_half_a_pod_and_a_whole_one(pod):
    """Of gradients, statistics and scalars; `make slices` asks the same of ImageNet's networks."""
    config, *_, told = pod
    assert [row["devices"] for row in told["phases"]] == [256, 512, 512]
    assert {tuple(row["programs"]) for row in told["phases"]} == {("update 1",)}
    size = 4 * numbers_reduced(config)
    assert [row["collectives"] for row in told["phases"]] == [{"all-reduce": [1, size]}] * 3
    # The sum and the weight of the loss and of the accuracy, in 4 bytes each.
    assert [row["collectives"] for row in told["evaluations"]] == [{"all-reduce": [1, 16]}] * 2
    assert told["fits"]


def test_passes_multiply_the_work_and_not_the_reductions(libtpu, tmp_path):
    one, four = (
        configs.tiny(f"max_per_device_batch={16 * slots}", "limits.max_batch_size=128",
                     "recipe.batch_size=128", "recipe.falls=()") for slots in (4, 1)
    )
    phases = make_phases(one)
    found = slices.parse("v2:1x1", phases)
    whole, cut = (
        slices.compile_for(config, phases, found, tmp_path)["phases"][0] for config in (one, four)
    )
    assert (whole["programs"], cut["programs"]) == (["update 4"], ["accumulate 1", "apply"])
    # Of loss, accuracy and objective the weights are one number, which only `update` can know.
    (once, size), = whole["collectives"].values()
    assert cut["collectives"] == {"all-reduce": [once, size + 2 * 4]} and once == 1
    assert cut["flops"] == pytest.approx(whole["flops"], rel=0.1)


def run_plan(*arguments):
    """(status, output, errors) of the command."""
    done = subprocess.run(
        [sys.executable, "-m", "bigbatch.plan", *arguments], cwd=REPOSITORY, text=True,
        capture_output=True, timeout=300, env=os.environ | {"XLA_FLAGS": ""},
    )
    return done.returncode, done.stdout, done.stderr


def test_a_change_that_makes_it_fit_is_found(libtpu, tmp_path, monkeypatch):
    """Where a device had room for more than 2 ghost batches of its 4, and not for all."""
    config = configs.tiny("ghost_size=64", "recipe.batch_size=512", "recipe.falls=()",
                          "limits.max_batch_size=512")
    config.network = "tests.support.foreign_models.ConvNet"
    config.model = ConfigDict({"ghost_size": 64})
    phases = make_phases(config)

    def told(most=256, name="v2:1x1"):
        other = config.copy_and_resolve_references()
        other.max_per_device_batch = most
        found = slices.parse(name, phases)
        return slices.compile_for(other, phases, found, tmp_path)["phases"][0]

    def limit(memory_bytes):
        kind = chips.TPUS["v2"]._replace(memory_bytes=memory_bytes)
        monkeypatch.setitem(chips.TPUS, "v2", kind)

    limit((told(128)["memory_bytes"] + told()["memory_bytes"]) // 2)
    advice = told()["advice"]
    setting, _, said = advice.partition(" fits (")
    assert said.startswith("2 passes an update)")
    assert told(int(setting.removeprefix("--config.max_per_device_batch=")))["fits"]
    assert not told()["fits"]  # the one pass there is with fewer
    # In one pass on the larger slice that it names, and not on one of half as many devices.
    devices = int(advice.partition("a slice of ")[2].split()[0])
    fitting = {name: told(512, name)["fits"] for name in ("v2:1x1", "v2:1x2", "v2:2x2")}
    assert fitting == {name: topology.parse(name).devices >= devices for name in fitting}
    assert True in fitting.values()
    limit(1000)
    assert told()["advice"].startswith("not even one ghost batch of 64 has room")


def test_a_split_of_the_state_that_makes_it_fit_is_found(libtpu, tmp_path, monkeypatch):
    """Where parameters, Adam's state and the gradient are too large for a device together."""
    config = configs.tiny(
        "recipe.falls=()", "data.num_classes=8192", "recipe.epochs=0.1", "optimizer.name=adam",
        "ghost_size=1", "recipe.batch_size=16", "limits.max_batch_size=16", "eval_batch_size=2")
    config.network, config.model = "tests.support.foreign_models.Regression", ConfigDict()
    parameters = 4 * 65 * 8192
    phases = make_phases(config)
    kind = chips.TPUS["v5litepod"]._replace(memory_bytes=int(3.9 * parameters))
    monkeypatch.setitem(chips.TPUS, "v5litepod", kind)
    found = slices.parse("v5litepod-8", phases)
    told = slices.compile_for(config, phases, found, tmp_path)
    assert told["phases"][0]["advice"] == "--config.sharding.optimizer=True fits"
    sizes = told["states"]["v5litepod-8"]
    rest = 4 * 8192  # the bias, which is too small to be cut
    count, cut = 12, parameters - rest  # Adam's count of updates, and the weights of its averages
    assert sizes == {"": 3 * parameters + count,
                     "optimizer": parameters + 2 * (cut // 8 + rest) + count,
                     "parameters": 3 * (cut // 8 + rest) + count}
    shown = " ".join(tables.of_plan(plan(config, 8) | {"compiled": told}).split())
    assert "state takes 0.00595 GiB of each device of v5litepod-8 if it is whole" in shown
    config.sharding.optimizer = True
    split = slices.compile_for(config, phases, found, tmp_path)["phases"][0]
    assert split["fits"] and split["memory_bytes"] < told["phases"][0]["memory_bytes"]
    exchanged = split["collectives"]
    assert exchanged["reduce-scatter"] == [1, cut // 8]
    assert exchanged["all-gather"] == [1, cut]
    assert exchanged["all-reduce"][1] < 2 * rest


def test_a_plan_that_does_not_fit_ends_with_status_1(libtpu, tmp_path):
    """Parameters and momentum of 20 million classes; the compiler refuses them."""
    classes = 20_000_000
    config = tmp_path / "many_classes.py"
    config.write_text(
        "from ml_collections import ConfigDict\n"
        "from tests.support import configs\n\n\n"
        "def get_config(argument):\n"
        "    config = configs.load('digits', 'decay,recipe.falls=()')\n"
        "    config.network = 'tests.support.foreign_models.Regression'\n"
        "    config.model = ConfigDict()\n"
        f"    config.data.num_classes = {classes}\n"
        "    return config\n", encoding="utf-8")
    status, output, _ = run_plan(f"--config={config}", "--topology=v2:1x1", "--plan_cache=")
    assert status == 1
    gib = 65 * 4 * classes / chips.GIB  # of the parameters, and as much of momentum
    said = ("0 does not fit on v2:1x1: not even one ghost batch of 16 has room on a device: "
            f"parameters and the optimizer's state take {2 * gib:.1f} GiB, whole on each device of "
            "7.5 GiB, so neither a smaller batch nor a larger slice of this kind helps; a device "
            "with ")
    told = " ".join(output.split())
    assert said in told
    assert re.search(r"with [\d.]+ GiB, as .*h200 \(104.8\) have, or a smaller network, is n", told)
    (row,) = [line.split() for line in output.splitlines() if line.split()[:2] == ["0", "v2:1x1"]]
    assert float(row[4]) > 2 * gib > float(row[5])
    assert row[-1] == "no"


def test_flash_attention_is_three_kernels_a_block_and_a_plan_says_what_it_leaves_out(
    libtpu, tmp_path
):
    """Forward, and backward for queries, and for keys with values; `test_transformer` runs them."""
    config = small_language.get_config("small,dtype=bfloat16,recipe.falls=()")
    config.data.options.length = 128
    with config.unlocked():
        config.model.attention = "splash"
    phases = make_phases(config)
    told = slices.compile_for(config, phases, slices.parse("v5litepod:1x1", phases), tmp_path)
    assert told["fits"] and [row["kernels"] for row in told["phases"]] == [3 * config.model.blocks]
    text = " ".join(tables._compiled_paragraphs(told))
    assert "leave out kernels that were written by hand" in text and "No GPU" not in text


def test_strategies_are_compared_by_what_the_compiler_says(libtpu, tmp_path):
    """The rows are those of a plan of each strategy; the same programs are compiled once."""
    config = configs.tiny("recipe.falls=((1,4),)", "limits.max_batch_size=192")
    config.network, config.model = "tests.support.foreign_models.Regression", ConfigDict()
    found = [topology.parse(name) for name in ("v2:1x1", "v2:2x2")]
    rows = compare.compare(config, ["decay", "increase"], found, tmp_path)
    assert len(rows) == 5 and all(row["fits"] for row in rows) and any(
        row["unbeaten"] for row in rows)
    for row in rows[:4]:
        own = config.copy_and_resolve_references()
        own.strategy = row["strategy"]
        phases = make_phases(own)
        told = slices.compile_for(own, phases, slices.parse(row["slice"], phases), tmp_path)
        assert row["seconds"] == told["seconds_at_least"] > 0
        assert row["chip_hours"] == told["chip_hours_at_least"]
        assert row["updates"] == sum(phase.updates for phase in phases)
    assert "strategy" in tables.of_strategies(rows)


def test_a_second_plan_compiles_nothing(pod):
    config, phases, found, folder, told = pod
    before = len(COMPILATIONS)
    assert slices.compile_for(config, phases, found, folder) == told
    assert len(COMPILATIONS) == before


def test_what_is_remembered_of_one_kind_is_not_said_of_another(libtpu, tmp_path):
    config = configs.tiny("recipe.falls=()", "limits.max_batch_size=48", "noise.every_epochs=0.5",
                          "noise.ghosts=5")
    config.network, config.model = "tests.support.foreign_models.Regression", ConfigDict()
    phases = make_phases(config)
    told = [slices.compile_for(config, phases, slices.parse(name, phases), tmp_path)
            for name in ("v2:1x1", "v3:1x1")]
    two, three = (one["phases"][0] for one in told)
    assert (two["devices"], two["programs"]) == (three["devices"], three["programs"])
    assert two["seconds"] > three["seconds"] > 0
    # The noise scale of 5 ghost batches, one a device and pass, after every half epoch of two.
    (measured,) = told[0]["measurements"]
    assert (measured["programs"], measured["count"]) == (["accumulate 1", "measure"], 4)
    assert measured["collectives"] == {"all-reduce": [1, measured["collectives"]["all-reduce"][1]]}
    assert told[0]["seconds_at_least"] == pytest.approx(math.fsum(
        count * row["seconds"] for count, row in (
            (phases[0].updates, two), (told[0]["evaluations"][0]["count"],
                                       told[0]["evaluations"][0]), (4, measured))))


def test_the_totals_are_the_sums_of_their_parts(pod):
    *_, told = pod
    phases = make_phases(configs.tiny())
    seconds = [phase.updates * row["seconds"]
               for phase, row in zip(phases, told["phases"], strict=True)]
    seconds += [row["count"] * row["seconds"] for row in told["evaluations"]]
    chips = [row["chips"] for row in told["phases"] + told["evaluations"]]
    assert chips == [128, 256, 256, 128, 256]
    assert told["seconds_at_least"] == pytest.approx(math.fsum(seconds)) and min(seconds) > 0
    assert 3600 * told["chip_hours_at_least"] == pytest.approx(
        math.fsum(one * count for one, count in zip(seconds, chips, strict=True)))
    # Every half epoch of two: as a run writes them, one at each.
    assert [row["count"] for row in told["evaluations"]] == [1, 3]


def test_the_table_fits_a_terminal(pod):
    config, phases, found, _, told = pod
    text = tables.of_plan(plan(config, [one.devices for one in found]) | {"compiled": told})
    assert max(map(len, text.splitlines())) <= 100
    rows = [line.split()[:3] for line in text.splitlines() if " v2-" in line]
    assert rows == [["0", "v2-256", "256"], ["1", "v2-512", "512"], ["2", "v2-512", "512"],
                    ["evaluation", "v2-256", "256"], ["evaluation", "v2-512", "512"]]
    assert "chip-hours. A lower bound" in " ".join(text.split())


def test_slots_that_stay_idle_are_counted_and_the_largest_slice_without_any_is_named():
    config = configs.load(
        "imagenet_inception_resnet_v2", "figure7_momentum_0.9,model.blocks=(1,1,1)")
    first = plan(config, 256)["phases"][0]
    assert (first["batch_size"], first["idle_share"], first["fills_devices"]) == (8192, 0.5, 128)


def test_the_record_of_language_presets_is_what_the_docs_say():
    """Which fit; and each parameter is reduced once, in as many parts as the compiler likes."""
    record = json.loads((REPOSITORY / "experiments/records/slices_language.json").read_text())
    shown = rows_of((REPOSITORY / "docs/language.md").read_text())
    assert [row for row in rows_of(table(record["plans"])) if row not in shown] == []
    for planned in record["plans"]:
        on_v5e = planned["topology"].startswith("v5litepod")
        fits = not (planned["config"] == "language:llama_1b" and on_v5e)
        assert planned["compiled"]["fits"] is fits
        for row in planned["compiled"]["phases"] if fits else ():
            reduced = sum(size for _, size in row["collectives"].values())
            assert row["collectives"].keys() == {"all-reduce"}
            assert 0 <= reduced - 4 * planned["parameters"] < 64
            assert row["kernels"] > 0


def test_the_record_of_imagenets_presets_is_what_the_docs_say():
    """Made by `make slices`, in hours; each update in it is one reduction and nothing else."""
    record = json.loads((REPOSITORY / "experiments/records/slices.json").read_text())
    shown = rows_of((REPOSITORY / "launch/README.md").read_text())
    assert [row for row in rows_of(table(record["plans"])) if row not in shown] == []
    assert {planned["config"] for planned in record["plans"]} == set(PRESETS)
    assert {planned["topology"] for planned in record["plans"]} >= set(SLICES)
    for planned in record["plans"]:
        told = planned["compiled"]
        assert told["fits"], (planned["config"], planned["topology"])
        # In float32: parameters, a mean and a variance of each normalised channel (26 560 in
        # ResNet-50; 30 272 in Inception-ResNet-V2 and 896 in its auxiliary head), and 4 scalars.
        channels = 26_560 if "resnet50" in planned["config"] else 30_272 + 896
        size = 4 * (planned["parameters"] + 2 * channels + 4)
        for row in told["phases"]:
            assert row["collectives"] == {"all-reduce": [1, size]}


def test_without_the_compiler_it_is_one_line():
    script = (
        "from pathlib import Path\n"
        "from bigbatch import command_line, plan\n"
        "from bigbatch.planning import topology\n"
        "topology.LIBTPU = Path('nowhere')\n"
        "command_line.run(plan.main)\n"
    )
    with contextlib.suppress(ImportError):
        import libtpu  # noqa: F401

        pytest.skip("libtpu is installed among the packages here")
    environment = {key: value for key, value in os.environ.items() if key != "TPU_LIBRARY_PATH"}
    done = subprocess.run(
        [sys.executable, "-c", script, "--config=configs/digits.py", "--topology=v2-8"],
        cwd=REPOSITORY, text=True, capture_output=True, timeout=120, env=environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and "make .tpu/installed" in done.stderr, done.stderr


def test_hundreds_of_arrays_are_one_reduction(libtpu):
    """Where the TPU's compiler left to itself makes one of each 256."""
    mesh = topology.make_mesh(topology.parse("v2-8"))
    arrays = [jax.ShapeDtypeStruct((8, 128), np.float32, sharding=devices.cut(mesh))] * 600

    def reductions(options):
        mapped = jax.shard_map(lambda tree: jax.lax.psum(tree, devices.AXIS), mesh=mesh,
                               in_specs=P(devices.AXIS), out_specs=P(), check_vma=False)
        text = jax.jit(mapped, compiler_options=options).lower(arrays).compile().as_text()
        return compiled.collectives(text)["all-reduce"]

    assert reductions(devices.compiler_options(mesh)) == [1, 600 * 128 * 4]
    assert reductions(None)[0] > 1
