"""What a whole run adds to its updates: measurements from the timing.jsonl of real runs."""

import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax
from ml_collections import ConfigDict

from bigbatch import train
from bigbatch.storage.logs import read_events
from bigbatch.update import update
from experiments.figures import REPOSITORY, load_config
from experiments.speed.bare import BareUpdate, describe, narrow, on_gpu, wide_resnet
from experiments.speed.measure import Measurement, ratios

BLOCKED_SECONDS = 0.15  # a save may block a run for so long, or for one update if that is longer


def cifar(short: bool, *settings: str) -> ConfigDict:
    """`wide_resnet` for a whole run, on CPU a narrow one; the short form with few examples."""
    few = ["data.train_examples=2048", "ghost_size=16", "recipe.batch_size=16"]
    return wide_resnet(short, "data.test_examples=500", "recipe.falls=()", "eval_every_epochs=1000",
                       *narrow(), *(few * short), *settings)


def train_in(config: ConfigDict, folder: str) -> list[dict[str, Any]]:
    """Trains a whole run in a workdir of its own; returns the events of its timing.jsonl."""
    workdir = Path(tempfile.mkdtemp(dir=folder))
    train.train_and_evaluate(config, workdir, show=False)
    return read_events(workdir / "timing.jsonl")


def goodput(repeats: int, short: bool) -> list[Measurement]:
    """A run's speed over that of its bare update, and the time that its saves block it."""
    stretch, turns = (300 if on_gpu() else 4 if short else 10), 4
    config = cifar(short)
    # Logs are as far apart as the config has them for CIFAR-10, saves 200 times as often.
    found, saves = _beside_bare(config, stretch, turns, repeats, saves=2)
    setting = f"{_describe(config)}, {stretch * turns} updates, 2 checkpoints"
    one = statistics.median(found.seconds["bare"]) / (stretch * turns)
    interval = load_config("configs/cifar10.py:decay")
    between = (interval.checkpoint_every_epochs * interval.data.train_examples
               / config.recipe.batch_size * one)
    return [
        found._replace(name="goodput of a whole run", setting=setting, target=">= 0.97"),
        Measurement(
            "checkpoint: blocked per save, over the longer of one update and 0.15 s", setting,
            "<= 1.0", "x", [round(save / max(one, BLOCKED_SECONDS), 4) for save in saves],
            seconds={"blocked": saves, "update": [round(one, 4)]}),
        Measurement(
            "checkpoint: share of a run at the default interval",
            f"{setting}; every {interval.checkpoint_every_epochs:g} epochs of "
            f"{interval.data.train_examples} examples", "<= 0.01", "x",
            [round(save / between, 6) for save in saves]),
    ]


def demo_python(repeats: int, short: bool) -> list[Measurement]:
    """The share of a demo run's time that its updates do not take."""
    stretch, turns = (10, 2) if short else (90, 10)  # 90 updates are an epoch
    config = load_config("configs/digits.py:decay")
    # Twice the repeats, since the machine's noise is larger than what is measured. No saves, which
    # have measurements of their own.
    found, _ = _beside_bare(config, stretch, turns, repeats if short else 2 * repeats, saves=0)
    return [found._replace(
        name="small networks: share of Python between updates",
        setting=f"configs/digits.py, {stretch * turns} updates of {config.recipe.batch_size}",
        target="<= 0.05", values=[round(1.0 - value, 4) for value in found.values])]


def phase_changes(repeats: int, short: bool) -> list[Measurement]:
    """The cost of a phase's end when the next program is ready, and when it is not."""
    config = cifar(
        short, "strategy=increase", "log_every_epochs=1e-9", "checkpoint_every_epochs=1000")
    one = config.recipe.batch_size / config.data.train_examples  # an update, in epochs
    extra, during, outlasted = [], [], False
    with tempfile.TemporaryDirectory() as folder:

        def train_phases(updates: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
            """A run with a first phase of so many updates: its events, and the second phase's."""
            # The largest program is compiled at the start, and the second phase's meanwhile.
            config.recipe.falls = ((updates * one, 2.0), ((updates + 4) * one, 2.0))
            config.recipe.epochs = (updates + 8) * one
            events = train_in(config, folder)
            return events, [event for event in events if event["event"] == "phase"][1]

        for _ in range(min(repeats, 2)):  # long enough to compile, and then to train for a while
            events, second = train_phases(1500 if on_gpu() else 150 if short else 100)
            outlasted |= second["waited_seconds"] > 0.1
            slowed, after = _while_compiling(
                events, second["examples_seen"], sum(second["compile_seconds"]))
            during.append(round(after / slowed, 4))
            extra.append(round((second["extra_seconds"] + second["waited_seconds"]) / after, 4))
        events, second = train_phases(2)
    logged = any("not ready" in event.get("text", "") for event in events)
    what = _describe(config)
    return [
        Measurement(
            "phase change: extra time over one update", f"{what}, then "
            f"{2 * config.recipe.batch_size}", "<= 1.0", "x", extra,
            "the compile outlasted the phase" * outlasted),
        Measurement(
            "phase change, next program not ready: wait that was logged",
            f"{what}, phase of 2 updates, nothing cached", "logged", "s",
            [second["waited_seconds"] * logged], "" if logged else "NOT LOGGED"),
        Measurement("speed while the next program compiles, over speed after", what, "", "x",
                    during),
    ]


def time_to_accuracy(repeats: int, short: bool) -> list[Measurement]:
    """The demo's whole command with `decay` over that with `increase`, wall clock."""
    seconds: dict[str, list[float]] = {"decay": [], "increase": []}
    shorter = ",recipe.epochs=1,recipe.falls=((0.5,3),)" if short else ""
    counts, accuracies = {}, {"decay": [], "increase": []}
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
                accuracies[strategy].append(last["test_accuracy"])
    means = ", ".join(f"{strategy} {statistics.mean(values):.4f}"
                      for strategy, values in accuracies.items())
    return [
        Measurement("time to accuracy: decay's wall clock over increase's",
                    f"configs/digits.py, whole command; test accuracy {means}", "", "x",
                    ratios(*seconds.values()), seconds=seconds),
        Measurement("updates: decay's over increase's", "configs/digits.py", "", "x",
                    [round(counts["decay"] / counts["increase"], 3)]),
    ]


def _beside_bare(
    config: ConfigDict, stretch: int, turns: int, repeats: int, saves: int
) -> tuple[Measurement, list[float]]:
    """A run's speed over its bare update's, and how many seconds each of its saves blocked it.

    Within each run its updates and bare updates take turns, `stretch` of them at a time, so that a
    machine that is slower for a while is slower for both. A turn of the run has all that the run
    does between updates. No turn has what comes before the first update and after the last.

    Args:
        config: of the run but for its length; changed.
        stretch: updates in a turn.
        turns: of the run; each is between two turns of the bare update.
        repeats: runs.
        saves: checkpoints in these turns, evenly apart. (One more is after them, at the run's end.)
    """
    # One more update ends the last turn.
    one = config.recipe.batch_size / config.data.train_examples
    config.recipe.epochs = (stretch * turns + 1) * one
    config.recipe.falls = ()
    config.eval_every_epochs = 2 * config.recipe.epochs
    config.checkpoint_every_epochs = (
        stretch * turns // saves * one if saves else 2 * config.recipe.epochs)
    bare = BareUpdate(config)
    bare.take()
    seconds: dict[str, list[float]] = {"run": [], "bare": []}
    blocked: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(repeats):
            ends: list[float] = []  # of turns, a bare one first
            with mock.patch.object(train, "take_update", _taking_turns(bare, stretch, ends)):
                events = train_in(config, folder)
            for name, spent in zip(seconds, _run_and_bare(ends), strict=True):
                seconds[name].append(round(spent, 4))
            blocked += [event["blocked_seconds"] for event in events if event["event"] == "save"]
    return Measurement(
        "", "", "", "x", ratios(seconds["bare"], seconds["run"]), seconds=seconds), blocked


def _taking_turns(bare: BareUpdate, stretch: int, ends: list[float]) -> Callable:
    """A run's `take_update` that before every `stretch` updates lets `bare` take as many.

    The times at which each of these turns of `bare` began and ended are added to `ends`.
    """
    own, numbers = train.take_update, itertools.count()

    def take_update(calls: list, state: update.State, *rest: Any, **hooks: Any) -> tuple:
        if next(numbers) % stretch == 0:
            jax.block_until_ready(state)
            ends.append(time.perf_counter())
            bare.take(stretch)
            ends.append(time.perf_counter())
        return own(calls, state, *rest, **hooks)

    return take_update


def _run_and_bare(ends: list[float]) -> tuple[float, float]:
    """Seconds of a run's turns, and of the bare turns: the means of those before and after each."""
    lengths = [end - start for start, end in itertools.pairwise(ends)]
    bares, runs = lengths[::2], lengths[1::2]
    return sum(runs), sum(bares) - (bares[0] + bares[-1]) / 2


def _while_compiling(
    events: list[dict[str, Any]], until: int, compiling: float
) -> tuple[float, float]:
    """Median seconds of the first phase's updates, while the next program compiled and after.

    The phase's first and last update are left out. Where the phase ended before the compilation, or
    nothing was left to compile, both medians are of all updates.
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
    return f"{describe(config)}, batch {config.recipe.batch_size}, {config.dtype}"
