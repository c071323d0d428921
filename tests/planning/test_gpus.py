"""Plans for GPUs, by XLA's compiler for CUDA, without one."""

import pytest

from bigbatch.config import make_layouts, make_phases
from bigbatch.data import feed
from bigbatch.job import chips
from bigbatch.plan import plan
from bigbatch.planning import cards, compiled, slices, tables, topology
from bigbatch.planning.kernels import kernels, least_seconds
from bigbatch.programs import lowering
from bigbatch.programs.compilation import programs_of
from bigbatch.tasks import contract
from bigbatch.update import network, update
from tests.planning.test_slices import numbers_reduced
from tests.support import configs, small_language


@pytest.mark.parametrize(("name", "shape", "devices"), (
    ("h100-1", (1, 1), 1), ("h200-8", (1, 8), 8), ("a100-16", (2, 8), 16), ("h100:2x4", (2, 4), 8),
))
def test_a_name_is_hosts_of_cards(name, shape, devices):
    found = topology.parse(name)
    assert (found.shape, found.devices, found.chips) == (shape, devices, devices)
    assert found.one_host.shape == (1, 1)


@pytest.mark.parametrize("name", ("h100-0", "h100-12", "h100:2x16", "h100:2x2x2", "h100:0x8"))
def test_what_no_hosts_hold_is_refused(name):
    with pytest.raises(ValueError, match="GPUs come as 1 to 8, 16, 24 and so on.*h100:2x4"):
        topology.parse(name)


def test_without_the_compiler_it_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(cards, "PLUGINS", tmp_path)
    monkeypatch.setattr(cards.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="make .cuda/installed") as told:
        topology.make_mesh(topology.parse("h100-8"))
    assert "\n" not in str(told.value)


TEXT = """HloModule jit_f, is_scheduled=true

%fused_gather (param_0: u8[50000,3072], param_1: s32[4,1]) -> f32[4,3072] {
  %param_0 = u8[50000,3072]{1,0} parameter(0)
  %param_1 = s32[4,1]{1,0} parameter(1)
  %gather.1 = u8[4,3072]{1,0} gather(%param_0, %param_1), offset_dims={1}
  ROOT %convert.1 = f32[4,3072]{1,0} convert(%gather.1)
}

%fused_add (param_0.1: f32[4,3072]) -> f32[2,3072] {
  %param_0.1 = f32[4,3072]{1,0} parameter(0)
  %slice.1 = f32[2,3072]{1,0} slice(%param_0.1), slice={[0:2], [0:3072]}
  ROOT %add.1 = f32[2,3072]{1,0} add(%slice.1, %slice.1)
}

ENTRY %main (images: u8[50000,3072], rows: s32[4,1]) -> f32[2,3072] {
  %images = u8[50000,3072]{1,0} parameter(0)
  %rows = s32[4,1]{1,0} parameter(1)
  %gathered = f32[4,3072]{1,0} fusion(%images, %rows), kind=kLoop, calls=%fused_gather
  %start = f32[4,3072]{1,0} all-reduce-start(%gathered), channel_id=1
  %done = f32[4,3072]{1,0} all-reduce-done(%start)
  %view = f32[4,3072]{1,0} bitcast(%done)
  ROOT %added = f32[2,3072]{1,0} fusion(%view), kind=kLoop, calls=%fused_add
}
"""


def test_a_kernel_moves_its_arrays_and_of_one_that_it_cuts_the_part_it_takes():
    rows = 4 * 3072
    assert kernels(TEXT) == [rows + 16 + 4 * rows, 2 * 4 * rows, 4 * rows]


def test_the_least_time_is_that_of_launches_memory_or_matrix_units():
    kind = chips.GPUS["h100"]
    assert least_seconds([10] * 300, kind, 0.0) == pytest.approx(300e-6)
    assert least_seconds([int(3.352e12), 10], kind, 0.0) == pytest.approx(1.0, rel=1e-5)
    assert least_seconds([10], kind, 2 * 989e12) == pytest.approx(2.0)


@pytest.fixture
def cuda():
    if not any(cards.PLUGINS.glob("*")):
        pytest.skip(f"needs the compiler for CUDA in {cards.PLUGINS} (make .cuda/installed)")


def test_a_deterministic_update_adds_up_tokens_in_one_order(cuda, tmp_path):
    # The gradient of an embedding is a sum by token. Threads add to it as they come, or else the
    # tokens are sorted first.
    config = small_language.get_config("small")
    phases = make_phases(config)
    found = slices.parse("h100-1", phases)
    mesh, layout = topology.make_mesh(found[0]), make_layouts(config, phases, 1)[0]
    program, = programs_of(layout)
    kernels_of = {}
    for deterministic in (False, True):
        config.deterministic = deterministic
        net, fields = network.build(config), contract.fields_of(config, contract.task_of(config))
        lower = lowering.lowering(config, net, mesh, update.abstract_state(config, net, mesh),
                                  *feed.resident_shapes(config, fields, mesh))
        kernels_of[deterministic] = compiled.measure(
            lower(program), found[0].kind, mesh, tmp_path, deterministic).kernels
    assert kernels_of[False] < kernels_of[True], "and a plan keeps an answer for each"


def test_an_update_on_two_hosts_is_one_reduction(cuda, tmp_path):
    config = configs.tiny()
    phases = make_phases(config)
    found = slices.parse("h100:2x2,1=h200-1", phases)
    told = slices.compile_for(config, phases, found, tmp_path)
    many, *alone = told["phases"]
    assert many["devices"] == 4 and many["programs"] == ["update 1"]
    # In one vector, where the weights of loss, accuracy and objective and the number of examples
    # stay apart, although they are equal.
    assert many["collectives"] == {"all-reduce": [1, 4 * (numbers_reduced(config) + 2)]}
    assert [row["collectives"] for row in alone] == [{}, {}]
    for row in told["phases"]:
        assert 10 < row["kernels"] < 1000 and row["seconds"] > 0.99e-6 * row["kernels"]
        assert 0 < row["accessed_bytes"] and row["fits"]
    text = tables.of_plan(plan(config, [one.devices for one in found]) | {"compiled": told})
    assert max(map(len, text.splitlines())) <= 100
    assert f"Kernels, and what they read and write: 0 {many['kernels']} and" in text
