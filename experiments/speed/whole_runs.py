"""What a whole run adds to its updates: figures read from the timing.jsonl of real runs."""

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from bigbatch import train
from bigbatch.config import make_phases
from bigbatch.metrics import read_events
from experiments.curves import APART, training_seconds
from experiments.figures import REPOSITORY, load_config
from experiments.speed.bare import NOISE, BareUpdate
from experiments.speed.measure import Figure, ratios
from experiments.speed.peers import on_gpu

BLOCKED_SECONDS = 0.15  # that a save may block, or one update where that is longer


def cifar(short: bool, *settings: str) -> str:
    """configs/cifar10.py with noise for images; on CPU a WRN-16-1, in the short form WRN-10-1."""
    small = ["model.depth=10", "model.width=1", "data.image_size=8", "data.augment.crop=8",
             "data.train_examples=2048", "ghost_size=16", "recipe.batch_size=16"]
    return ",".join([
        f"configs/cifar10.py:decay,{NOISE}", "data.test_examples=500", "recipe.falls=()",
        "eval_every_epochs=1000",
        *(small if short else ["dtype=bfloat16"] if on_gpu() else ["model.width=1"]), *settings])


def train_in(config: ConfigDict, folder: str) -> list[dict[str, Any]]:
    """A whole run in a workdir of its own: the events of its timing.jsonl."""
    workdir = Path(tempfile.mkdtemp(dir=folder))
    train.train_and_evaluate(config, workdir, show=False)
    return read_events(workdir / "timing.jsonl")


def goodput(repeats: int, short: bool) -> list[Figure]:
    """A run's examples a second over those of its bare update, and what its saves block."""
    updates = 2000 if on_gpu() else 16 if short else 60
    config = load_config(cifar(short))
    # Logs as far apart as the config has them for CIFAR-10, saves 40 times as often.
    config.recipe.epochs = updates * config.recipe.batch_size / config.data.train_examples
    config.checkpoint_every_epochs = config.recipe.epochs / 2
    goodput_of, saves = _beside_bare(config, updates, min(repeats, 3))
    setting = f"{_describe(config)}, {updates} updates, 2 checkpoints"
    one = statistics.median(goodput_of.seconds["bare"]) / updates
    interval = load_config("configs/cifar10.py:decay")
    between = (interval.checkpoint_every_epochs * interval.data.train_examples
               / config.recipe.batch_size * one)
    return [
        goodput_of._replace(name="goodput of a whole run", setting=setting, target=">= 0.97"),
        Figure("checkpoint: blocked per save, over the longer of one update and 0.15 s", setting,
               "<= 1.0", "x", [round(save / max(one, BLOCKED_SECONDS), 4) for save in saves],
               seconds={"blocked": saves, "update": [round(one, 4)]}),
        Figure("checkpoint: share of a run at the default interval",
               f"{setting}; every {interval.checkpoint_every_epochs:g} epochs of "
               f"{interval.data.train_examples} examples", "<= 0.01", "x",
               [round(save / between, 6) for save in saves]),
    ]


def demo_python(repeats: int, short: bool) -> list[Figure]:
    """The share of a demo run's time that its updates do not take."""
    epochs = 0.2 if short else 10
    config = load_config(
        f"configs/digits.py:decay,recipe.epochs={epochs},recipe.falls=(),eval_every_epochs=1000")
    updates = sum(phase.updates for phase in make_phases(config))
    # Many, since the machine's noise is larger than what is measured; without the save at the end,
    # which has rows of its own.
    found, _ = _beside_bare(
        config, updates, repeats if short else 2 * repeats, (*APART, "checkpoint"))
    return [found._replace(
        name="small networks: share of Python between updates",
        setting=f"configs/digits.py, {updates} updates of {config.recipe.batch_size}",
        target="<= 0.05", values=[round(1.0 - value, 4) for value in found.values])]


def phase_changes(repeats: int, short: bool) -> list[Figure]:
    """What a phase's end costs when the next program is ready, and when it is not."""
    batch = 16 if short else 128
    setting = ["strategy=increase", "log_every_epochs=1e-9", "checkpoint_every_epochs=1000"]
    extra, during, waits, outlasted = [], [], [], False
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(min(repeats, 2)):
            # Long enough to be compiled and to train on for a while; then hardly anything.
            for updates in ((1500 if on_gpu() else 150 if short else 100), 2)[: 1 if repeat else 2]:
                config = load_config(cifar(short, *setting))
                one = batch / config.data.train_examples  # an update, in epochs
                epoch = updates * one
                # The largest is compiled at the start; the second meanwhile.
                config.recipe.falls = ((epoch, 2.0), (epoch + 4 * one, 2.0))
                config.recipe.epochs = epoch + 8 * one
                events = train_in(config, folder)
                second = [event for event in events if event["event"] == "phase"][1]
                if updates == 2:
                    told = any("not ready" in event.get("text", "") for event in events)
                    waits.append(second["waited_seconds"] if told else 0.0)
                    continue
                outlasted |= second["waited_seconds"] > 0.1
                slowed, after = _while_compiling(
                    events, second["examples_seen"], sum(second["compile_seconds"]))
                during.append(round(after / slowed, 4))
                extra.append(round((second["extra_seconds"] + second["waited_seconds"]) / after, 4))
    what = _describe(config)
    return [
        Figure("phase change: extra time over one update", f"{what}, then {2 * batch}", "<= 1.0",
               "x", extra, "the compile outlasted the phase" * outlasted),
        Figure("phase change, next program not ready: wait that was logged",
               f"{what}, phase of 2 updates, nothing cached", "logged", "s", waits,
               "" if all(waits) else "NOT LOGGED"),
        Figure("speed while the next program compiles, over speed after", what, "", "x", during),
    ]


def time_to_accuracy(repeats: int, short: bool) -> list[Figure]:
    """The demo's whole command with `decay` over that with `increase`, wall clock."""
    seconds: dict[str, list[float]] = {"decay": [], "increase": []}
    shorter = ",recipe.epochs=1,recipe.falls=((0.5,3),)" if short else ""
    counts, accuracies = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(1 if short else 1 + min(repeats, 2)):  # the first fills the cache
            for strategy in list(seconds)[:: 1 if repeat % 2 else -1]:
                workdir = Path(folder) / f"{strategy}{repeat}"
                began = time.perf_counter()
                subprocess.run(
                    [sys.executable, "-m", "bigbatch.main", f"--workdir={workdir}",
                     f"--config=configs/digits.py:{strategy},seed={repeat}{shorter}",
                     f"--compilation_cache={folder}/cache"],
                    cwd=REPOSITORY, check=True, capture_output=True)
                if repeat or short:
                    seconds[strategy].append(round(time.perf_counter() - began, 3))
                last = read_events(workdir / "metrics.jsonl")[-1]
                counts[strategy] = last["updates"]
                accuracies.setdefault(strategy, []).append(last["test_accuracy"])
    means = ", ".join(f"{strategy} {statistics.mean(values):.4f}"
                      for strategy, values in accuracies.items())
    return [
        Figure("time to accuracy: decay's wall clock over increase's",
               f"configs/digits.py, whole command; test accuracy {means}", "", "x",
               ratios(seconds["decay"], seconds["increase"]), seconds=seconds),
        Figure("updates: decay's over increase's", "configs/digits.py", "", "x",
               [round(counts["decay"] / counts["increase"], 3)]),
    ]


def _beside_bare(
    config: ConfigDict, updates: int, repeats: int, apart: Sequence[str] = APART
) -> tuple[Figure, list[float]]:
    """A run's speed over its bare update's, each run between two stretches of that, and its saves.
    """
    bare = BareUpdate(config)
    seconds: dict[str, list[float]] = {"run": [], "bare": []}
    saves: list[float] = []

    def stretch() -> float:
        began = time.perf_counter()
        bare.take(updates)
        return time.perf_counter() - began

    bare.take()
    with tempfile.TemporaryDirectory() as folder:
        before = stretch()
        for _ in range(repeats):
            events = train_in(config, folder)
            after = stretch()
            seconds["run"].append(round(training_seconds(events, apart), 4))
            seconds["bare"].append(round((before + after) / 2, 4))
            saves += [event["blocked_seconds"] for event in events if event["event"] == "save"]
            before = after
    return Figure("", "", "", "x", ratios(seconds["bare"], seconds["run"]), seconds=seconds), saves


def _while_compiling(
    events: list[dict[str, Any]], until: int, compiling: float
) -> tuple[float, float]:
    """Median seconds of the first phase's updates, while the next program compiled and after.

    The first update and the phase's last are left out. Where the phase ended first, or nothing was
    left to compile, both are of all updates.
    """
    passed, slowed, after = 0.0, [], []
    speeds = [event for event in events
              if event["event"] == "speed" and event["updates"] and event["examples_seen"] < until]
    for event in speeds[1:]:
        passed += event["seconds"]
        (slowed if passed < compiling else after).append(1.0 / event["updates_per_second"])
    every = slowed + after
    return statistics.median(slowed or every), statistics.median(after or every)


def _describe(config: ConfigDict) -> str:
    return (f"WRN-{config.model.depth}-{config.model.width}, batch {config.recipe.batch_size}, "
            f"{config.dtype}")
