"""Where a run's time goes, as timing.jsonl has it, and what share of a chip's peak it uses."""

import contextlib
import io
import re

import jax
import pytest

from bigbatch import schedule, train
from bigbatch.config import make_phases
from bigbatch.data import feed
from bigbatch.job import chips
from bigbatch.job.devices import make_mesh
from bigbatch.programs import compilation, lowering
from bigbatch.schedule.layout import make_layout
from bigbatch.storage.logs import read_events
from bigbatch.tasks import contract
from bigbatch.update import network
from bigbatch.update import update as updating
from tests.support import configs
from tests.support.updates import conv_net

PEAK = 1e12  # given to the CPU, in one run


# --- operations -------------------------------------------------------------------------------
def convolution(size, inputs, outputs, kernel, stride, before, after):
    """Multiply-adds of a square convolution: all, and those with real pixels; its output's size."""
    out = (size + before + after - kernel) // stride + 1
    real = sum(0 <= place * stride - before + tap < size
               for place in range(out) for tap in range(kernel))
    return inputs * outputs * (out * kernel) ** 2, inputs * outputs * real**2, out


def multiply_adds(stem, layers):
    """(all, real) of the layers (size, inputs, outputs, kernel, stride, before, after), and of the
    stem alone, which comes first."""
    counts = [convolution(*layer)[:2] for layer in [stem, *layers]]
    return tuple(map(sum, zip(*counts, strict=True))), counts[0]


def wide_resnet_16_4():
    size, inputs, layers = 32, 16, []
    for width, stride in ((64, 1), (128, 2), (256, 2)):
        before = 0 if stride == 2 else 1  # SAME: one column behind is enough for a stride of 2
        layers += [(size, inputs, width, 3, stride, before, 1),
                   (size, inputs, width, 1, stride, 0, 0)]
        size //= stride
        layers += [(size, width, width, 3, 1, 1, 1)] * 3
        inputs = width
    return multiply_adds((32, 3, 16, 3, 1, 1, 1), [*layers, (1, 256, 10, 1, 1, 0, 0)])


def resnet_50():
    size, inputs, layers = 56, 64, []
    for blocks, width, stride in ((3, 64, 1), (4, 128, 2), (6, 256, 2), (3, 512, 2)):
        for block in range(blocks):
            by = stride if block == 0 else 1
            layers += [(size, inputs, width, 1, 1, 0, 0), (size, width, width, 3, by, 1, 1)]
            if block == 0:
                layers.append((size, inputs, 4 * width, 1, by, 0, 0))
            size //= by
            layers.append((size, width, 4 * width, 1, 1, 0, 0))
            inputs = 4 * width
    # The stem as the network has it: 4x4 over patches of 2x2 pixels, 12 channels.
    return multiply_adds((112, 12, 64, 4, 1, 2, 1), [*layers, (1, 2048, 1000, 1, 1, 0, 0)])


def lowered(config, layout, mesh):
    net = network.build(config)
    state = updating.abstract_state(config, net, mesh)
    fields = contract.fields_of(config, contract.task_of(config))
    lower = lowering.lowering(config, net, mesh, state, *feed.resident_shapes(config, fields, mesh))
    return [compilation.Compiled(None, 0.0, compilation.count_flops(lower(key)), None)
            for key in compilation.programs_of(layout)]


@pytest.mark.parametrize(
    ("name", "preset", "counted", "published"),
    [("cifar10", "increase", wide_resnet_16_4, 0.3926e9),
     ("imagenet_resnet50", "thirty_minutes", resnet_50, 4.089e9)])
def test_operations_are_six_times_the_multiply_adds(name, preset, counted, published):
    """Two for each multiply-add, forward and in either gradient. The usual figures also count a
    convolution's products with its padding, which XLA does not; and nobody needs the gradient of
    the images. What is left over is what convolutions are not."""
    config = configs.load(name, f"{preset},ghost_size=8")
    layout = make_layout(8, 8, 1, 8, 0)
    mesh = make_mesh(jax.devices()[:1])
    flops = compilation.update_flops(lowered(config, layout, mesh), layout)
    (whole, real), (stem, real_stem) = counted()
    usual = whole
    if name == "imagenet_resnet50":
        usual += 112**2 * 64 * 7**2 * 3 - stem  # of the 7x7 convolution
    assert usual == pytest.approx(published, rel=1e-3)
    assert flops / 8 == pytest.approx(6 * real - 2 * real_stem, rel=0.02)
    assert 0.9 < flops / 8 / (6 * published) < 1.0


def test_operations_of_an_update_do_not_depend_on_how_it_is_dealt():
    """One pass on one device; and 8 devices in two passes each, of which a quarter stands empty."""
    config = conv_net(features=32)
    one, many = make_layout(192, 16, 1, 192, 0), make_layout(192, 16, 8, 16, 0)
    assert (one.microbatches, many.microbatches, many.idle_share) == (1, 2, 0.25)
    alone, dealt = (
        compilation.update_flops(
            lowered(config, layout, make_mesh(jax.devices()[: layout.devices])), layout)
        for layout in (one, many)
    )
    assert dealt == pytest.approx(alone, rel=0.05)


def test_peaks_are_those_of_whole_matrix_units():
    """Units of 128x128, two operations a cycle each."""
    units = [tpu.peak_flops / (2 * 128 * 128 * tpu.clock_hertz) for tpu in chips.TPUS.values()]
    assert units == pytest.approx([1, 2, 8, 4, 8, 16], rel=0.02)
    assert chips.peak_flops("TPU v5 lite", "float32") == 197e12
    assert chips.peak_flops("NVIDIA H200", "bfloat16") == 989e12
    assert chips.peak_flops("NVIDIA H100 80GB HBM3", "float32") == 494.7e12
    for kind, dtype in (("cpu", "float32"), ("NVIDIA H100 PCIe", "bfloat16"),
                        ("NVIDIA H200", "float64")):
        assert chips.peak_flops(kind, dtype) is None


# --- a run ------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """A run whose second program cannot be ready when its first phase, of one update, is over: its
    config, its timing.jsonl and what was printed. Its chip is given a peak."""
    config = conv_net(
        "recipe.epochs=4", "recipe.batch_size=128", "limits.max_batch_size=512",
        "recipe.falls=((0.05,2),(1,2),(2,2),(3,2))", "eval_every_epochs=4", features=32)
    folder, printed = tmp_path_factory.mktemp("watched"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(printed):
        patch.setitem(chips.TPU_PEAKS, "cpu", PEAK)
        jax.config.update("jax_enable_compilation_cache", False)
        try:
            train.train_and_evaluate(config, folder)
        finally:
            jax.config.update("jax_enable_compilation_cache", True)
    return config, read_events(folder / "timing.jsonl"), printed.getvalue()


def of_kind(events, kind):
    return [event for event in events if event["event"] == kind]


def test_a_wait_for_the_compiler_is_seen_and_logged(watched):
    _, events, printed = watched
    phases = of_kind(events, "phase")
    assert [phase["waited_seconds"] > 0.01 for phase in phases[:2]] == [False, True], phases
    text = f"waiting for the compiler: phase {phases[1]['phase']} is not ready"
    assert text in printed
    assert text in [event["text"] for event in of_kind(events, "notice")]
    assert printed.count("waiting for the compiler") == sum(
        phase["waited_seconds"] > 0.01 for phase in phases)


def test_a_phase_change_costs_no_more_than_an_update(watched):
    """Where the next program was there; the best of them, since a busy machine adds to any."""
    config, events, _ = watched
    phases = of_kind(events, "phase")
    assert len(phases) == len(make_phases(config)) and phases[0]["extra_seconds"] is None
    ready = [phase for phase in phases[1:] if phase["waited_seconds"] < 0.01]
    update = max(1 / event["updates_per_second"] for event in of_kind(events, "speed"))
    assert 0 <= min(phase["extra_seconds"] for phase in ready) <= update, (ready, update)
    assert all(phase["first_update_seconds"] > 0 for phase in phases)


def test_time_is_shared_out_in_full(watched):
    _, events, printed = watched
    whole = events[-1]
    assert whole["event"] == "time_share"
    names = ["update", "input", "evaluation", "checkpoint", "compile", "other"]
    for event in [whole, *of_kind(events, "speed")]:
        assert list(event["time_share"]) == names
        assert sum(event["time_share"].values()) == pytest.approx(1, abs=1e-3)
        assert all(share >= 0 for share in event["time_share"].values())
    speeds = of_kind(events, "speed")
    spent = {name: sum(event["seconds"] * event["time_share"][name] for event in speeds)
             for name in names}
    # All but what came after the last line of metrics: the last save.
    for name in ("update", "evaluation", "compile"):
        share = spent[name] / whole["wall_seconds"]
        assert whole["time_share"][name] == pytest.approx(share, abs=0.01), name
    lines = [line for line in printed.splitlines() if line.startswith("time: ")]
    assert len(lines) == 1
    shown = dict(re.findall(r"(\w+) ([\d.]+) %", lines[0]))
    assert {name: float(shown[name]) for name in names} == pytest.approx(
        {name: 100 * share for name, share in whole["time_share"].items()}, abs=0.051)


def test_utilisation_is_operations_over_the_time_of_training(watched):
    config, events, _ = watched
    phases = {phase.name: phase for phase in make_phases(config)}
    mesh, known = make_mesh(), {}
    at = {phase.end_example: phase for phase in phases.values()}
    for event in of_kind(events, "speed"):
        phase = at.get(event["examples_seen"]) or schedule.phase_at(
            list(phases.values()), event["examples_seen"] - 1)
        if phase.batch_size not in known:
            layout = make_layout(
                phase.batch_size, 16, mesh.size, config.max_per_device_batch, 0)
            known[phase.batch_size] = compilation.update_flops(
                lowered(config, layout, mesh), layout)
        expected = event["updates_per_second"] * known[phase.batch_size] / (PEAK * mesh.size)
        assert event["model_flop_utilisation"] == pytest.approx(expected, rel=0.01, abs=1e-4)


def test_the_utilisation_of_an_unknown_chip_is_not_made_up(tmp_path):
    config = conv_net("recipe.epochs=0.2", "recipe.falls=()")
    train.train_and_evaluate(config, tmp_path, show=False)
    speeds = of_kind(read_events(tmp_path / "timing.jsonl"), "speed")
    assert {event["model_flop_utilisation"] for event in speeds} == {"unknown chip"}
