"""Moments at which to kill a run: each waits for one, and says whether the run was still there.

Arguments are the process, its workdir, `random.Random`, and the seconds of an undisturbed run. The
cache of compiled programs lies beside the workdir.
"""

import random
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from bigbatch.storage import checkpoint
from bigbatch.storage.logs import read_events

Process, Draw = subprocess.Popen, random.Random


def any_time(running: Process, workdir: Path, draw: Draw, seconds: float) -> bool:
    """Anywhere from the first import to the end."""
    return _survives(running, draw.uniform(0, seconds))


def first_compile(running: Process, workdir: Path, draw: Draw, seconds: float) -> bool:
    """With nothing compiled yet, and while the cache of programs is being filled."""
    cache = workdir.parent / "cache"
    return _reaches(running, lambda: any(cache.glob("*-cache")), draw.uniform(0, 3))


def during_a_save(running: Process, workdir: Path, draw: Draw, seconds: float) -> bool:
    """While a checkpoint has not got its name yet."""
    saves = draw.randrange(1, 4)
    seen: set[str] = set()

    def saving() -> bool:
        seen.update(path.name for path in (workdir / "checkpoints").glob("*.unfinished"))
        return len(seen) >= saves

    return _reaches(running, saving, draw.uniform(0, 0.1))


def after_a_save(running: Process, workdir: Path, draw: Draw, seconds: float) -> bool:
    """As soon as a new checkpoint has its name, where old ones are being removed."""
    before = set(checkpoint.finished(workdir))
    return _reaches(
        running, lambda: bool(set(checkpoint.finished(workdir)) - before), draw.uniform(0, 0.05))


def phase_change(running: Process, workdir: Path, draw: Draw, seconds: float) -> bool:
    """As a phase begins, and not the one that the start itself begins with."""
    before = _phases_begun(workdir)
    return _reaches(running, lambda: _phases_begun(workdir) > before + 1, draw.uniform(0, 0.05))


def evaluation(running: Process, workdir: Path, draw: Draw, seconds: float) -> bool:
    """Just after an evaluation was due, which is nearly always inside it or the next."""
    before = _evaluations(workdir)
    return _reaches(running, lambda: _evaluations(workdir) > before, draw.uniform(0, 0.1))


MOMENTS = (any_time, first_compile, during_a_save, after_a_save, phase_change, evaluation)


def _phases_begun(workdir: Path) -> int:
    return sum(line["event"] == "phase" for line in read_events(workdir / "timing.jsonl"))


def _evaluations(workdir: Path) -> int:
    return sum("test_loss" in line for line in read_events(workdir / "metrics.jsonl"))


def _reaches(running: Process, ready: Callable[[], bool], wait: float) -> bool:
    while not ready():
        if running.poll() is not None:
            return False
        time.sleep(0.002)
    return _survives(running, wait)


def _survives(running: Process, seconds: float) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if running.poll() is not None:
            return False
        time.sleep(0.002)
    return True
