"""Trains many runs by the main job's own command: those that are missing, side by side.

On CPU there is one run on each core at a time, held to its core, because networks this small do not
train faster on several. On an accelerator runs go one after the other, or `at_once` together, each
with its share of the memory (a small network does not fill a large accelerator). A run that has
finished or diverged is left alone; one that was stopped is continued. On a cluster, hand the
commands of `experiments.reproduce --print_commands` to its own queue instead.
"""

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from bigbatch.config import make_phases
from bigbatch.job import statuses
from bigbatch.mistake import Mistake
from bigbatch.schedule import Phase
from bigbatch.storage import continuing
from bigbatch.storage.logs import read_events
from experiments import logs, provenance
from experiments.figures import REPOSITORY, planned
from experiments.machine import jax_devices, own_cores


class Run(NamedTuple):
    """A training, by one command."""

    config: str  # file.py:preset,key=value,...
    workdir: Path

    def command(self, settings: Sequence[str] = (), python: str = "python") -> list[str]:
        """The command as a user would type it, in the repository."""
        return [python, "-m", "bigbatch.main", f"--config={self.config}", *settings,
                f"--workdir={self.workdir}"]


def diverged(run: Run) -> bool:
    """Whether the run diverged; trained again, it would diverge again."""
    return logs.divergence(read_events(run.workdir / "timing.jsonl")) is not None


def refuse_another(run: Run, saved: Mapping[str, Any]) -> None:
    """Raises Mistake, naming what differs, if a workdir holds the run of another config.

    Args:
        run: the one that should be there.
        saved: the workdir's config, phases and examples_seen.
    """
    config, phases = planned(run.config)
    refused, _ = continuing.changes(saved, config, _decided(run, config) or phases)
    if refused:
        raise Mistake(
            f"{run.workdir} holds a run of another config than {run.config}: {'; '.join(refused)}. "
            "Give another --workdir, or remove that folder."
        )


def is_over(run: Run) -> bool:
    """Whether the run has finished or diverged.

    Raises:
        Mistake: if no run can have this config, or the workdir holds a run of another config.
    """
    config, phases = planned(run.config)
    described = run.workdir / "config.json"
    if not described.exists():
        return False
    events = read_events(run.workdir / "metrics.jsonl")
    seen = events[-1]["examples_seen"] if events else 0
    saved = json.loads(described.read_text(encoding="utf-8"))
    refuse_another(run, saved | {"examples_seen": seen})
    phases = _decided(run, config) or phases
    return seen == phases[-1].end_example or diverged(run)


def _decided(run: Run, config: ConfigDict) -> tuple[Phase, ...]:
    """The phases of a run that decides, by its log; () for others."""
    if config.strategy != "measured":
        return ()
    return make_phases(config, tuple(
        (event["examples_seen"], event["grows_to"])
        for event in read_events(run.workdir / "metrics.jsonl") if "grows_to" in event))


def missing(runs: Sequence[Run], say: Callable[[str], None] = print) -> list[Run]:
    """Those of `runs` that are not over; `say` prints how many are.

    Raises:
        Mistake: see `is_over`.
    """
    found = [run for run in runs if not is_over(run)]
    if over := [run for run in runs if run not in found]:
        broken = sum(map(diverged, over))
        say(f"{len(over)} of {len(runs)} runs are over already"
            + f", {broken} of them diverged" * bool(broken))
    return found


def train_missing(
    runs: Sequence[Run], workdir: Path, module: str, settings: Sequence[str] = (), at_once: int = 0
) -> None:
    """Trains those of `runs` that are not over, and notes in `workdir` which command did so.

    Args:
        runs: all of the workdir; see `missing`.
        workdir: the folder with the runs' own.
        module: the program that was called.
        settings: see `train`.
        at_once: see `train`.
    """
    if not_over := missing(runs):
        provenance.add(workdir, provenance.describe(
            provenance.command_line(module), [run.config for run in not_over]))
        train(not_over, settings, at_once)


def train(
    runs: Sequence[Run], settings: Sequence[str] = (), at_once: int = 0,
    say: Callable[[str], None] = print,
) -> None:
    """Trains runs that are not over, in their order. A run that diverges has not failed.

    Args:
        runs: to be trained; at least one.
        settings: more flags of each command, as "--config.data.dir=DIR".
        at_once: how many side by side; 0 for one on each core of a CPU and one on an accelerator.
        say: prints a line for each run that has ended.

    Raises:
        Mistake: with a run's own line, as soon as one ends with status 2: what is wrong with its
            command, data or machine is most likely wrong with all. Those under way save and end.
        RuntimeError: with a run's own output, if one failed, once all others have ended.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, once the running ones have saved and ended.
    """
    on_cpu, cores = jax_devices()[0] == "cpu", own_cores()
    at_once = min(at_once or (len(cores) if on_cpu else 1), len(runs))
    waiting, under_way = list(runs), {}  # under way: run and process by slot
    failures, mistakes = [], []
    began, ended = time.perf_counter(), 0
    with (_stop_signals() as signals, tempfile.TemporaryDirectory() as folder,
          contextlib.ExitStack() as at_an_error):
        at_an_error.callback(_terminate, under_way)
        while under_way or (waiting and not signals):
            for slot in set(range(at_once)) - under_way.keys():
                if waiting and not signals:
                    run, core = waiting.pop(0), cores[slot % len(cores)] if on_cpu else None
                    under_way[slot] = run, _start(run.command(settings, sys.executable), core,
                                                  at_once, Path(folder, str(slot)))
            time.sleep(0.1)
            if signals == ["received"]:
                signals.append("passed on")
                _terminate(under_way)
            for slot, (run, process) in list(under_way.items()):
                if process.poll() is None:
                    continue
                del under_way[slot]
                if signals or mistakes:
                    continue
                ended, passed, how = ended + 1, time.perf_counter() - began, ""
                if process.returncode and diverged(run):
                    how = "DIVERGED "
                elif process.returncode:
                    how, text = "FAILED ", Path(folder, str(slot)).read_text(errors="replace")
                    if process.returncode == statuses.MISTAKE:
                        mistakes.append(f"{text.strip().rpartition('bigbatch: ')[2]} (So said "
                                        f"{shlex.join(run.command(settings))}, and no other run is "
                                        "started.)")
                        waiting.clear()
                        _terminate(under_way)
                        continue
                    failures.append(f"{shlex.join(run.command(settings))} ended with status "
                                    f"{process.returncode}:\n{text[-4000:]}")
                left = passed / ended * (len(runs) - ended) / 60
                say(f"{ended} of {len(runs)}, {passed:.0f} s: {run.config} {how}"
                    f"(about {left:.0f} min left)")
    if signals:
        raise KeyboardInterrupt
    if mistakes:
        raise Mistake(mistakes[0])
    if failures:
        raise RuntimeError(f"{len(failures)} of {len(runs)} runs failed. The first: {failures[0]}")


def _terminate(under_way: Mapping[int, tuple[Run, subprocess.Popen]]) -> None:
    for _, process in under_way.values():
        process.terminate()


def _start(
    command: Sequence[str], core: int | None, at_once: int, output: Path
) -> subprocess.Popen:
    if core is not None and at_once > 1 and shutil.which("taskset"):
        command = ["taskset", "-c", str(core), *command]
    # Or the first process's JAX would take three quarters of a GPU's memory. A CPU ignores this.
    share = {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.9 / at_once:.3f}"} if at_once > 1 else {}
    with output.open("w") as file:
        # In a session of its own, so that Ctrl-C reaches this program alone, which passes it on.
        return subprocess.Popen(command, cwd=REPOSITORY, env=os.environ | share, stdout=file,
                                stderr=subprocess.STDOUT, start_new_session=True)


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[str]]:
    """A list that Ctrl-C and SIGTERM add to, in place of their usual effect."""
    signals: list[str] = []
    before = {number: signal.signal(number, lambda *_: signals or signals.append("received"))
              for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
