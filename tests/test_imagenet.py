"""ImageNet's configs: the paper's counts, and their smoke form on real photographs, killed once."""

import itertools
import os
import signal
import subprocess
import sys
import time

import pytest

from bigbatch import evaluate, train
from bigbatch.config import make_layouts, make_phases
from bigbatch.data import decode
from bigbatch.mistake import Mistake
from bigbatch.programs import compilation
from bigbatch.storage import checkpoint
from bigbatch.storage.logs import read_events
from tests.support import configs, started
from tests.support.sample_data import data_dir

# (config, preset): batches and rates of the phases, and updates, from the paper and its arithmetic.
RECIPES = {
    ("imagenet_resnet50", "batch_8k"): (
        [8192] * 5, [3.2, 3.2, 0.32, 0.032, 0.0032], 14_075),
    ("imagenet_resnet50", "thirty_minutes"): (
        [8192] * 2 + [16_384] * 3, [3.2, 3.2, 0.64, 0.064, 0.0064], 9_384),
    ("imagenet_resnet50", "batch_16k"): (
        [16_384] * 5, [6.4, 6.4, 0.64, 0.064, 0.0064], 7_038),
    ("imagenet_inception_resnet_v2", "figure6_decay"): (
        [8192] * 4, [3.0, 0.3, 0.03, 0.003], 14_075),
    ("imagenet_inception_resnet_v2", "figure6_increase"): (
        [8192] + [81_920] * 3, [3.0, 3.0, 0.3, 0.03], 5_630),
    ("imagenet_inception_resnet_v2", "figure7_momentum_0.9"): (
        [8192] + [65_536] * 3, [3.0, 2.4, 0.24, 0.024], 5_865),
    ("imagenet_inception_resnet_v2", "figure7_momentum_0.95"): (
        [16_384] + [65_536] * 3, [3.0, 1.2, 0.12, 0.012], 3_519),
    ("imagenet_inception_resnet_v2", "figure7_momentum_0.975"): (
        [32_768] + [65_536] * 3, [3.0, 0.6, 0.06, 0.006], 2_346),
}


@pytest.mark.parametrize(("name", "preset"), RECIPES)
def test_the_phases_are_the_papers(name, preset):
    batches, rates, updates = RECIPES[name, preset]
    phases = make_phases(configs.load(name, preset))
    assert [phase.batch_size for phase in phases] == batches
    assert [phase.learning_rate_end for phase in phases] == pytest.approx(rates, rel=1e-12)
    assert abs(sum(phase.updates for phase in phases) - updates) <= 2
    if name == "imagenet_resnet50":
        assert (phases[0].name, phases[0].learning_rate) == ("warmup", 0.1)
    first_ghosts = {"6": 32, "7": 64}.get(preset.removeprefix("figure")[0], 32)
    assert configs.load(name, preset).ghost_size == first_ghosts


@pytest.mark.parametrize(("name", "preset"), RECIPES)
def test_the_smoke_form_keeps_the_phases(name, preset):
    """The same names, and batches and rates that stand in the same proportions."""
    full = make_phases(configs.load(name, preset))
    small = make_phases(configs.load(name, f"{preset},smoke=true"))
    assert [phase.name for phase in small] == [phase.name for phase in full]
    for phase, like in zip(small, full, strict=True):
        assert phase.batch_size * 512 == like.batch_size
        ratio = phase.learning_rate_end / small[-1].learning_rate_end
        assert ratio == pytest.approx(like.learning_rate_end / full[-1].learning_rate_end)


@pytest.mark.parametrize(("name", "preset", "killed"), [
    ("imagenet_resnet50", "thirty_minutes", False),
    pytest.param("imagenet_inception_resnet_v2", "figure7_momentum_0.95", True,
                 marks=pytest.mark.slow),
])
def test_smoke_trains_through_all_phases_and_survives_a_kill(tmp_path, name, preset, killed):
    """In a third of its epochs. Figure 7's is killed: passes, dropout and a stream go on."""
    folder = data_dir("imagenet2012")
    settings = [f"--config=configs/{name}.py:{preset},smoke=true", f"--config.data.dir={folder}",
                "--config.recipe.epochs=3", "--config.recipe.falls=((1,10),(2,10),(2.67,10))",
                "--config.checkpoint_every_epochs=0.5", "--config.eval_every_epochs=1",
                f"--compilation_cache={started.CACHE}", "--config.tensorboard=false"]

    def start(workdir, *more):
        return subprocess.Popen(
            [sys.executable, "-m", "bigbatch.main", *settings, f"--workdir={workdir}", *more],
            cwd=started.REPOSITORY, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        )

    whole = tmp_path / "whole"
    started.end(start(whole))
    events = read_events(whole / "metrics.jsonl")
    config = configs.load(name, f"{preset},smoke=true")
    phases = [phase.name for phase in make_phases(config)]
    assert list(dict.fromkeys(event["phase"] for event in events)) == phases
    assert events[-1]["train_loss"] < events[0]["train_loss"]
    speeds = [event for event in read_events(whole / "timing.jsonl") if event["event"] == "speed"]
    assert all(0 <= event["time_share"]["input"] < 1 for event in speeds if event["updates"])
    assert all(event["images_skipped"] == 0 for event in speeds)
    evaluated = evaluate.evaluate_run(whole)
    assert evaluated["test_loss"] == pytest.approx(events[-1]["test_loss"], rel=1e-5)
    if not killed:
        return

    workdir = tmp_path / "killed"
    log = workdir / "metrics.jsonl"
    process = start(workdir)
    started.wait_until(
        lambda: len({event["phase"] for event in read_events(log)}) > 2, process, "its third phase")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    stood = checkpoint.find_newest(workdir).run["examples_seen"]
    # Other workers and threads, which change nothing.
    started.end(start(workdir, "--config.data.workers=1", "--config.data.read_threads=3"))
    assert [event["examples_seen"] for event in read_events(workdir / "timing.jsonl")
            if event["event"] == "start"] == [0, stood]
    assert started.bits_different(workdir, whole) == 0
    assert log.read_bytes() == (whole / "metrics.jsonl").read_bytes()


def test_a_batch_of_65_536_runs_the_programs_of_a_smaller_one():
    """On one device every phase of Figure 7 and of the 30-minute run takes the same passes."""
    for (name, preset), (batches, *_) in RECIPES.items():
        config = configs.load(name, preset)
        layouts = make_layouts(config, make_phases(config), 1)
        assert len({compilation.programs_of(layout) for layout in layouts}) == 1, preset
        passes = [batch // config.max_per_device_batch for batch in batches]
        assert [layout.microbatches for layout in layouts] == passes


SETTINGS = (
    "decay", "strategy=constant", "data.streaming=true", "data.crop_style=none",
    "data.eval_share=1.0", "tensorboard=false",
)
SCRIPT = """
import resource, sys
from tests.support import configs
from bigbatch import train
workdir, argument = sys.argv[1:]
config = configs.load("cifar10", argument)
pixels = 3 * config.data.image_size**2
config.network, config.model = "tests.support.foreign_models.Regression", {"pixels": pixels}
train.train_and_evaluate(config, workdir, show=False)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_a_slow_source_shows_as_time_spent_waiting_for_input(tmp_path, monkeypatch):
    """And images that are of no use are counted, whatever the run then makes of them."""
    config = configs.load("cifar10", ",".join([
        *SETTINGS, "recipe.batch_size=128", f"data.dir={data_dir('cifar10')}",
        "data.train_split=train[:512]", "data.train_examples=512", "recipe.epochs=1",
        "data.test_split=test[:128]", "data.test_examples=128", "eval_batch_size=16",
        "data.on_bad_image=skip", "log_every_epochs=0.25",
    ]))
    config.network = "tests.support.foreign_models.Regression"
    config.model = {"pixels": 3 * 32 * 32}
    decode_image, decoded = decode.decode, itertools.count()

    def slow(*arguments):
        time.sleep(0.005)
        if next(decoded) % 64 == 0:
            raise Mistake("is no image today")
        return decode_image(*arguments)

    monkeypatch.setattr(decode, "decode", slow)
    train.train_and_evaluate(config, tmp_path, show=False)
    speeds = [event for event in read_events(tmp_path / "timing.jsonl")
              if event["event"] == "speed"]
    assert max(event["time_share"]["input"] for event in speeds[1:-1]) > 0.5, speeds
    assert speeds[-1]["images_skipped"] == -(-(512 + 128) // 64), speeds


def test_streamed_memory_does_not_grow_with_the_batch(tmp_path):
    """Peak memory of whole processes at 1x and 16x the batch, in the same microbatches.

    The images are enlarged: few to decode make up the memory.
    """
    folder, side, examples = data_dir("cifar10"), 128, 3_072
    peak = {}
    for batch in (examples // 16, examples):
        workdir = tmp_path / str(batch)
        argument = ",".join([
            *SETTINGS, f"recipe.batch_size={batch}", f"data.dir={folder}",
            f"data.image_size={side}", f"data.augment.crop={side}", "ghost_size=64",
            "max_per_device_batch=64", f"data.train_split=train[:{examples}]",
            f"data.train_examples={examples}", "recipe.epochs=1", "data.test_split=test[:64]",
            "data.test_examples=64", "eval_batch_size=64",
        ])
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(workdir), argument], cwd=started.REPOSITORY,
            text=True, check=False, capture_output=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        )
        assert done.returncode == 0, done.stderr
        peak[batch] = int(done.stdout.split()[-1]) / 1024  # MiB
        assert read_events(workdir / "metrics.jsonl")[-1]["updates"] == examples // batch
    images = examples * side * side * 3 / 2**20
    print(f"peak MiB by batch: {peak}; the larger batch's images alone are {images:.0f} MiB")
    assert peak[examples] < peak[examples // 16] + images / 8, peak
