"""Trains many runs by the main job's own command: what is missing, side by side.

On CPU one run a core at a time, each held to its core: networks this small are too small to share
out. On an accelerator one after the other, or `at_once` together, each with its share of the
memory (a small network does not fill a large accelerator alone). A run that has finished or
diverged is left alone; one that was cut short goes on.
"""

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from queue import Queue
from typing import NamedTuple

from bigbatch.config import check, make_phases
from bigbatch.job import statuses
from bigbatch.storage import continuing
from bigbatch.storage.logs import read_events
from experiments import curves, provenance
from experiments.figures import REPOSITORY, load_config
from experiments.machine import jax_devices, own_cores


class Run(NamedTuple):
    """What one command trains."""

    config: str  # file.py:preset,key=value,...
    workdir: Path

    def command(self, settings: Sequence[str] = ()) -> list[str]:
        """As a user would type it, in the repository."""
        return ["python", "-m", "bigbatch.main", f"--config={self.config}", *settings,
                f"--workdir={self.workdir}"]


def diverged(run: Run) -> bool:
    """Whether training broke down, as it would again."""
    return curves.divergence(read_events(run.workdir / "timing.jsonl")) is not None


def is_over(run: Run) -> bool:
    """Whether the workdir holds the run to its end, or to where it diverged.

    Raises:
        ValueError: if the config can be no run, or the workdir holds one of another config.
    """
    config = load_config(run.config)
    check(config)
    phases = make_phases(config)
    described = run.workdir / "config.json"
    if not described.exists():
        return False
    events = read_events(run.workdir / "metrics.jsonl")
    seen = events[-1]["examples_seen"] if events else 0
    saved = json.loads(described.read_text(encoding="utf-8")) | {"examples_seen": seen}
    refused, _ = continuing.changes(saved, config, phases)
    if refused:
        raise ValueError(
            f"{run.workdir} holds a run of another config than {run.config}: {'; '.join(refused)}. "
            "Give another --workdir, or remove that folder."
        )
    return seen == phases[-1].end_example or diverged(run)


def train_noted(
    folder: Path, module: str, runs: Sequence[Run], settings: Sequence[str] = (), at_once: int = 0
) -> None:
    """`train_all`; what is trained, and with what, is first noted in `folder`.

    Args:
        folder: the workdir of all.
        module: the running program's, as "experiments.demo".
        runs: see `train_all`.
        settings: see there.
        at_once: see there.
    """
    if missing := [run.config for run in runs if not is_over(run)]:
        provenance.add(folder, provenance.describe(provenance.command_line(module), missing))
    train_all(runs, settings, at_once)


def train_all(
    runs: Sequence[Run], settings: Sequence[str] = (), at_once: int = 0,
    say: Callable[[str], None] = print,
) -> None:
    """Trains those of `runs` that are not over, in their order. To diverge is no failure.

    Args:
        runs: what to train.
        settings: more flags of each command, as "--config.data.dir=DIR".
        at_once: how many side by side; 0 for one a core on CPU and one on an accelerator.
        say: is told of each run that has ended.

    Raises:
        ValueError: see `is_over`; nothing has been trained then.
        RuntimeError: with what a run said, if one failed, once all others have ended.
    """
    missing = [run for run in runs if not is_over(run)]
    if len(missing) < len(runs):
        broken = [run for run in runs if diverged(run)]
        say(f"{len(runs) - len(missing)} of {len(runs)} runs are over already"
            + f", {len(broken)} of them diverged" * bool(broken))
    if not missing:
        return
    backend, cores = jax_devices().backend, own_cores()
    at_once = min(at_once or (len(cores) if backend == "cpu" else 1), len(missing))
    places: Queue[int] = Queue()
    for place in range(at_once):
        places.put(place)
    began, children, failures = time.perf_counter(), Children(), []

    def one(run: Run) -> None:
        place = places.get()
        try:
            core = cores[place % len(cores)] if backend == "cpu" and at_once > 1 else None
            _train(run, settings, core, at_once, children)
        finally:
            places.put(place)

    with _ended_by_signals(), ThreadPoolExecutor(at_once) as executor:
        futures = {}
        try:
            futures |= {executor.submit(one, run): run for run in missing}
            for number, future in enumerate(as_completed(futures), 1):
                passed = time.perf_counter() - began
                left = passed / number * (len(missing) - number)
                said = f"(about {left / 60:.0f} min left)"
                if error := future.exception():
                    failures.append(error)
                    said = f"FAILED {said}"
                elif diverged(futures[future]):
                    said = f"DIVERGED {said}"
                say(f"{number} of {len(missing)}, {passed:.0f} s: {futures[future].config} {said}")
        except BaseException:
            for future in futures:
                future.cancel()
            children.stop()
            raise
    if failures:
        raise RuntimeError(f"{len(failures)} of {len(missing)} runs failed. The first: "
                           f"{failures[0]}") from failures[0]


class Children:
    """The processes under way; once they are told to stop, no more are started."""

    def __init__(self):
        self._running: set[subprocess.Popen] = set()
        self._stopped, self._lock = False, threading.Lock()

    def run(self, command: Sequence[str], share: Mapping[str, str]) -> tuple[int, str]:
        """Runs one to its end: its status and what it said; (0, "") if all are stopped."""
        with self._lock:
            if self._stopped:
                return 0, ""
            child = subprocess.Popen(
                command, cwd=REPOSITORY, env=os.environ | share, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches this program alone, which passes it on
            )
            self._running.add(child)
        said, _ = child.communicate()
        with self._lock:
            self._running.discard(child)
            return 0 if self._stopped else child.returncode, said

    def stop(self) -> None:
        """Tells all to save and end."""
        with self._lock:
            self._stopped = True
            for child in self._running:
                with contextlib.suppress(ProcessLookupError):
                    child.send_signal(signal.SIGTERM)


def _train(
    run: Run, settings: Sequence[str], core: int | None, at_once: int, children: Children
) -> None:
    """One run, until it ends otherwise than by asking to be started again."""
    command = [sys.executable, *run.command(settings)[1:]]
    if core is not None and shutil.which("taskset"):
        command = ["taskset", "-c", str(core), *command]
    # Of a GPU's memory JAX would take three quarters for the first process. CPUs do not read this.
    share = {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.9 / at_once:.3f}"} if at_once > 1 else {}
    status = statuses.AGAIN
    while status == statuses.AGAIN:
        status, said = children.run(command, share)
    if status and not diverged(run):
        raise RuntimeError(
            f"{shlex.join(run.command(settings))} ended with status {status}:\n{said[-4000:]}"
        )


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM ends what is inside as Ctrl-C does, where there is a main thread to be told."""
    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    in_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, stop) if in_main else None
    try:
        yield
    finally:
        if in_main:
            signal.signal(signal.SIGTERM, before)
