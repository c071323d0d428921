"""Kills a run at random moments, spoils checkpoints between, and compares the end with a whole run.

    make soak

Every kill is SIGKILL to a real process. The moments are drawn from a fixed seed; which instruction
one hits is up to the machine.
"""

import argparse
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from bigbatch.storage import checkpoint
from bigbatch.storage.logs import read_events
from tests.support import started

# Three phases; evaluations and saves take about half of the time, so that kills hit them.
DIGITS = {"config": (
    "increase", "recipe.epochs=5", "recipe.falls=((2,3),(3.5,3))", "limits.max_batch_size=128",
    "log_every_epochs=0.05", "eval_every_epochs=0.1", "checkpoint_every_epochs=0.2",
    "eval_batch_size=20", "keep_checkpoints=3", "tensorboard=false",
)}


# A run that decides on its way when its batch grows.
DECIDES = {"config": (
    *DIGITS["config"], "strategy=measured", "ghost_size=8", "noise.window_epochs=0.3",
    "measured.every_epochs=0.1", "measured.stay_epochs=0.4",
)}


class Figures(NamedTuple):
    """What a soak found."""

    kills: Counter  # by moment
    resumes: int  # starts that went on from a checkpoint
    spoiled: int  # checkpoints damaged on purpose
    detected: int  # of these, reported by name at the next start
    bits_different: int
    same_metrics: bool
    half_lines: int  # that a start had to cut; the end has none


def soak(
    folder: Path, kills: int, seed: int, run: Mapping[str, Any] = DIGITS,
    say: Callable[[str], None] = print,
) -> Figures:
    """Runs once undisturbed, once with `kills` kills, and compares.

    Args:
        folder: for both runs and their compiled programs.
        kills: how many.
        seed: what the moments are drawn from.
        run: `file` and `config` of `started.start`.
        say: is told of each kill.
    """
    draw = random.Random(seed)
    began = time.monotonic()
    started.end(started.start(folder / "whole", **run, cache=folder / "cache"))
    seconds = time.monotonic() - began
    say(f"the undisturbed run took {seconds:.0f} s")

    workdir, cache = folder / "killed", folder / "cache"
    moments: Counter[str] = Counter()
    spoiled = half_lines = detected = resumes = 0
    faults: list[str] = []
    while moments.total() < kills:
        moment = draw.choice(MOMENTS)
        if moment is first_compile:
            shutil.rmtree(cache, ignore_errors=True)
        running = started.start(workdir, **run, cache=cache)
        reached = moment(running, workdir, draw, seconds)
        running.send_signal(signal.SIGKILL)
        output, _ = running.communicate()
        if not reached:
            if running.returncode == 0:  # its end came first: begin anew, with the same bits due
                detected += _detected(workdir, faults)
                resumes += _resumes(workdir)
                faults = []
                shutil.rmtree(workdir)
                continue
            if running.returncode != -signal.SIGKILL:
                raise AssertionError(f"ended by itself with {running.returncode}:\n{output}")
        moments[moment.__name__.replace("_", " ")] += 1
        log = workdir / "metrics.jsonl"
        half_lines += log.exists() and log.read_bytes()[-1:] not in (b"\n", b"")
        say(f"kill {moments.total()}: {moment.__name__.replace('_', ' ')}")
        if draw.random() < 0.4 and len(checkpoint.finished(workdir)) > 1:
            faults.append(spoil(checkpoint.finished(workdir)[-1], draw))
            spoiled += 1
            say(f"  spoiled {faults[-1]}")
    started.end(started.start(workdir, **run, cache=cache))
    logs = [(ended / "metrics.jsonl").read_bytes() for ended in (workdir, folder / "whole")]
    return Figures(
        kills=moments,
        resumes=resumes + _resumes(workdir),
        spoiled=spoiled,
        detected=detected + _detected(workdir, faults),
        bits_different=started.bits_different(workdir, folder / "whole"),
        same_metrics=logs[0] == logs[1],
        half_lines=half_lines,
    )


def spoil(path: Path, draw: random.Random) -> str:
    """Flips one bit of, cuts short or removes a file of a checkpoint; returns the file."""
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.stat().st_size)
    file = draw.choice(files)
    kind = draw.choice(("flip", "truncate", "remove"))
    content = bytearray(file.read_bytes())
    if kind == "remove":
        file.unlink()
    elif kind == "truncate":
        file.write_bytes(content[: draw.randrange(len(content))])
    else:
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        file.write_bytes(content)
    return str(file)


def any_time(running, workdir, draw, seconds) -> bool:
    """Anywhere from the first import to the end."""
    return _survives(running, draw.uniform(0, seconds))


def first_compile(running, workdir, draw, seconds) -> bool:
    """With nothing compiled yet, and while the cache of programs is being filled."""
    cache = workdir.parent / "cache"
    return _reaches(running, lambda: any(cache.glob("*-cache")), draw.uniform(0, 3))


def during_a_save(running, workdir, draw, seconds) -> bool:
    """While a checkpoint has not got its name yet."""
    saves = draw.randrange(1, 4)
    seen: set[str] = set()

    def saving() -> bool:
        seen.update(path.name for path in (workdir / "checkpoints").glob("*.unfinished"))
        return len(seen) >= saves

    return _reaches(running, saving, draw.uniform(0, 0.1))


def after_a_save(running, workdir, draw, seconds) -> bool:
    """As soon as a new checkpoint has its name, where old ones are being removed."""
    before = set(checkpoint.finished(workdir))
    return _reaches(
        running, lambda: bool(set(checkpoint.finished(workdir)) - before), draw.uniform(0, 0.05)
    )


def phase_change(running, workdir, draw, seconds) -> bool:
    """As a phase begins, and not the one that the start itself begins with."""
    before = _phases_begun(workdir)
    return _reaches(
        running, lambda: _phases_begun(workdir) > before + 1, draw.uniform(0, 0.05)
    )


def evaluation(running, workdir, draw, seconds) -> bool:
    """Just after an evaluation was due, which is nearly always inside it or the next."""
    before = _evaluations(workdir)
    return _reaches(running, lambda: _evaluations(workdir) > before, draw.uniform(0, 0.1))


MOMENTS = (any_time, first_compile, during_a_save, after_a_save, phase_change, evaluation)


def _detected(workdir: Path, faults: list[str]) -> int:
    """How many of these files a start has reported."""
    events = read_events(workdir / "timing.jsonl")
    notices = "\n".join(event["text"] for event in events if event["event"] == "notice")
    return sum(fault in notices for fault in faults)


def _resumes(workdir: Path) -> int:
    events = read_events(workdir / "timing.jsonl")
    return sum(event["event"] == "start" and event["examples_seen"] > 0 for event in events)


def _phases_begun(workdir: Path) -> int:
    return sum(line["event"] == "phase" for line in read_events(workdir / "timing.jsonl"))


def _evaluations(workdir: Path) -> int:
    return sum("test_loss" in line for line in read_events(workdir / "metrics.jsonl"))


def _reaches(running, ready: Callable[[], bool], wait: float) -> bool:
    while not ready():
        if running.poll() is not None:
            return False
        time.sleep(0.002)
    return _survives(running, wait)


def _survives(running, seconds: float) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if running.poll() is not None:
            return False
        time.sleep(0.002)
    return True


def main() -> None:
    """The long form, with its figures printed; status 1 unless nothing was lost."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--decides", action="store_true", help="with the strategy measured")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = soak(Path(folder), options.kills, options.seed,
                     DECIDES if options.decides else DIGITS)
    by_moment = ", ".join(f"{count} {moment}" for moment, count in sorted(found.kills.items()))
    print(f"kills: {found.kills.total()} ({by_moment})")
    print(f"resumes from a checkpoint: {found.resumes}")
    print(f"checkpoints spoiled: {found.spoiled}, detected: {found.detected}")
    print(f"half lines left by kills: {found.half_lines}")
    print(f"bits different at the end: {found.bits_different}")
    print(f"metrics.jsonl identical: {'yes' if found.same_metrics else 'NO'}")
    whole = not found.bits_different and found.same_metrics and found.detected == found.spoiled
    sys.exit(0 if whole else 1)


if __name__ == "__main__":
    main()
