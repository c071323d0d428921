"""The demonstration: one recipe, three schedules, one curve, on real images, in minutes.

    make demo

Trains configs/digits.py with "decay", "hybrid" and "increase" over several seeds, by the main job's
own command, one run a core at a time, and draws the picture and the table of `experiments.curves`
into --output. Run again, it continues what is there.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue

from experiments import curves

PRESETS = ("decay", "hybrid", "increase")  # the longest first, so that no core idles at the end
REPOSITORY = Path(__file__).parents[1]


def train(preset: str, seed: int, workdir: Path, core: int) -> None:
    """One run, on one core: these networks are too small to share out.

    Raises:
        RuntimeError: with what the run said, if it fails.
    """
    command = [
        sys.executable, "-m", "bigbatch.main", f"--config=configs/digits.py:{preset},seed={seed}",
        f"--workdir={workdir}", "--config.tensorboard=false",
    ]
    pin = [shutil.which("taskset"), "-c", str(core)] if shutil.which("taskset") else []
    done = subprocess.run(
        pin + command, cwd=REPOSITORY, env=os.environ | {"JAX_PLATFORMS": "cpu"}, text=True,
        capture_output=True, check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")


def main() -> None:
    """Runs the demonstration."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--output", type=Path, default=REPOSITORY / "runs" / "demo")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each schedule")
    options = parser.parse_args()
    if options.seeds < 1:
        sys.exit(f"experiments.demo: --seeds is {options.seeds}; it must be 1 or more.")
    began = time.perf_counter()
    free: Queue[int] = Queue()
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
    for core in cores:
        free.put(core)
    folders = {
        preset: [options.output.resolve() / f"{preset}-{seed}" for seed in range(options.seeds)]
        for preset in PRESETS
    }

    def one(preset: str, seed: int) -> None:
        core = free.get()
        try:
            train(preset, seed, folders[preset][seed], core)
        finally:
            free.put(core)
        print(f"{time.perf_counter() - began:5.0f} s  {preset}, seed {seed}", flush=True)

    with ThreadPoolExecutor(len(cores)) as executor:
        runs = [executor.submit(one, p, s) for p in PRESETS for s in range(options.seeds)]
        for run in runs:
            run.result()
    schedules = {preset: [curves.read_run(f) for f in folders[preset]] for preset in PRESETS}
    curves.draw(schedules, options.output / "curves.png", "digits: one recipe, three schedules")
    text = curves.table(schedules)
    (options.output / "table.md").write_text(text, encoding="utf-8")
    print(f"\n{text}\n{options.output / 'curves.png'} has the curves.")


if __name__ == "__main__":
    main()
