"""How long a run takes from its command to its first update, with compiled programs and without."""

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from bigbatch.storage.logs import read_events
from experiments.figures import REPOSITORY
from experiments.speed.bare import NOISE
from experiments.speed.measure import Measurement, ratios


class Started(NamedTuple):
    """One start, in seconds."""

    first_update: float  # from the command to the end of the first update
    compiling: float  # of the update's program


# One device and a small batch of small images, which change no number of compiled operations.
NETWORKS = {
    "digits WRN-10-1": ("configs/digits.py:decay,data.test_examples=360,recipe.epochs=0.01", ""),
    "WRN-16-4": (
        f"configs/cifar10.py:decay,{NOISE},ghost_size=8,recipe.batch_size=8,"
        "data.train_examples=16,recipe.epochs=0.5,data.test_examples=8,eval_batch_size=8", ""),
    "ResNet-50": (
        f"configs/imagenet_resnet50.py:batch_8k,{NOISE},dtype=float32,ghost_size=2,"
        "recipe.batch_size=2,recipe.epochs=0.5,data.train_examples=4,data.test_examples=2,"
        "data.image_size=64,eval_batch_size=2", "<= 0.3"),
    "Inception-ResNet-V2": (
        f"configs/imagenet_inception_resnet_v2.py:figure6_decay,{NOISE},dtype=float32,ghost_size=2,"
        "recipe.batch_size=2,recipe.epochs=0.5,data.train_examples=4,data.test_examples=2,"
        "data.image_size=128,eval_batch_size=2", ""),
}
SMALL = 3  # networks that compile in seconds and are started more than once
WARM = 3  # starts after each cold one


def start(config: str, folder: Path, cache: Path) -> Started:
    """Starts a run of one update, and waits until it ends.

    Raises:
        RuntimeError: with the run's output, if it fails.
    """
    workdir = Path(tempfile.mkdtemp(dir=folder))
    command = [
        sys.executable, "-m", "bigbatch.main",
        f"--config={config},recipe.falls=(),recipe.warmup_epochs=0,"
        "tensorboard=false", f"--workdir={workdir}", f"--compilation_cache={cache}",
    ]
    output = folder / "output.txt"
    began = time.perf_counter()
    with output.open("w") as file:
        child = subprocess.Popen(command, cwd=REPOSITORY, stdout=file, stderr=subprocess.STDOUT)
    # The phase's event is written at the end of its first update.
    while not (event := _phase_event(workdir)) and child.poll() is None:
        time.sleep(0.005)
    first = time.perf_counter() - began
    if child.wait() or not (event := event or _phase_event(workdir)):
        raise RuntimeError(
            f"{' '.join(command)} ended with {child.returncode}:\n{output.read_text()}")
    return Started(first, sum(event["compile_seconds"]))


def starts(repeats: int, short: bool) -> list[Measurement]:
    """Compile time and whole start with a filled cache beside those with an empty one.

    Each start is a process. Several warm starts follow a cold one, and each is compared with it.
    """
    found = []
    for number, (name, (config, to_reach)) in enumerate(NETWORKS.items()):
        if short and number:
            break
        once = number >= SMALL or short
        colds, warms = [], []
        with tempfile.TemporaryDirectory() as folder:
            for repeat in range(1 if once else min(repeats, 2)):
                cache = Path(folder) / f"cache{repeat}"
                cold = start(config, Path(folder), cache)
                for _ in range(1 if once else WARM):
                    colds.append(cold)
                    warms.append(start(config, Path(folder), cache))
        note = "once: a cold compile takes long" if once and not short else ""
        for kind, target in (("compiling", "<= 0.15"), ("first_update", to_reach)):
            seconds = {
                f"{state} {kind}": [round(getattr(one, kind), 3) for one in all_of]
                for state, all_of in (("cold", colds), ("warm", warms))}
            what = "compile time" if kind == "compiling" else "whole start to the first update"
            found.append(Measurement(
                f"{what}, warm cache beside cold", name, target, "x",
                ratios(seconds[f"warm {kind}"], seconds[f"cold {kind}"]), note, seconds))
    return found


def _phase_event(workdir: Path) -> dict | None:
    return next((event for event in read_events(workdir / "timing.jsonl")
                 if event["event"] == "phase"), None)
