"""Kills runs at random moments and damages checkpoints, and looks for what is lost by it.

    python -m tests.soak --kills=30 --corruptions=200 [--run=language] [--record=FILE]

A run that nothing disturbs comes first. Then runs of the same config are killed up to ten times
each, and between kills checkpoints are damaged. Each of them goes on to its end, and its state and
metrics.jsonl are compared with those of the first. The damages that are left are done to copies of
the first run's checkpoints, in which the newest whole one is then looked for as a start does it.

Every kill is SIGKILL to a real process. The moments are drawn from the seed; which instruction one
hits is up to the machine. With --record the counts are added to FILE after each run that was
compared, so a soak may take many sittings, each with moments of its own, and may be interrupted.
"""

import argparse
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bigbatch.mistake import Mistake
from bigbatch.storage import checkpoint
from bigbatch.storage.logs import read_events, replace_text
from experiments import provenance
from tests.support import started
from tests.support.moments import MOMENTS, first_compile

# Of each run three phases or more; evaluations and saves take about half of the time, so that kills
# hit them.
DIGITS = (
    "increase", "recipe.epochs=5", "recipe.falls=((2,3),(3.5,3))", "limits.max_batch_size=128",
    "log_every_epochs=0.05", "eval_every_epochs=0.1", "checkpoint_every_epochs=0.2",
    "eval_batch_size=20", "keep_checkpoints=3", "tensorboard=false",
)
RUNS = {
    "digits": {"config": DIGITS},
    # A run that decides on its way when its batch grows.
    "deciding": {"config": (
        *DIGITS, "strategy=measured", "ghost_size=8", "noise.window_epochs=0.3",
        "measured.every_epochs=0.1", "measured.stay_epochs=0.4",
    )},
    "language": {"file": "tests/support/small_language.py", "config": (
        "small", "recipe.epochs=6000 examples",
        "recipe.falls=(('2000 examples',2),('4000 examples',2))",
        "log_every_epochs=100 examples", "eval_every_epochs=250 examples",
        "checkpoint_every_epochs=400 examples", "keep_checkpoints=3",
    )},
}
KILLS_A_RUN = 10
A_RUN_S = 3600  # after which one that nothing kills is taken for one that hangs
# Of what a soak counts, what must stay 0.
LOSSES = ("undetected", "bits different", "logs different")


def soak(
    folder: Path, kills: int, corruptions: int, seed: int, run: Mapping[str, Any],
    say: Callable[[str], None] = print, after_each: Callable[[Counter], None] = lambda found: None,
) -> Counter:
    """Kills runs and damages checkpoints as often as is asked, and compares.

    Args:
        folder: for the runs and their compiled programs.
        kills: how many.
        corruptions: how many checkpoints to damage.
        seed: what moments and damages are drawn from.
        run: `file` and `config` of `started.start`.
        say: is told of each kill.
        after_each: is given the counts after each run that was compared, and at the end.

    Returns:
        Counts: `kills` and `kills: MOMENT`; `resumes`, starts that went on from a checkpoint;
        `half lines` that kills left in a log; `corruptions` and `corruptions: KIND`; `undetected`
        of these; `runs` that were compared; `bits different` in the state at their ends;
        `logs different`, files metrics.jsonl.
    """
    draw, found = random.Random(seed), Counter(dict.fromkeys(LOSSES, 0))
    began = time.monotonic()
    started.end(started.start(folder / "whole", **run, cache=folder / "cache"),
                seconds=A_RUN_S)
    seconds = time.monotonic() - began
    say(f"the undisturbed run took {seconds:.0f} s")
    while found["kills"] < kills:
        found.update(_killed(
            folder, min(KILLS_A_RUN, kills - found["kills"]), corruptions - found["corruptions"],
            draw, seconds, run, say))
        after_each(found)
    found.update(_damaged_copies(folder, corruptions - found["corruptions"], draw))
    after_each(found)
    return found


def _killed(
    folder: Path, kills: int, corruptions: int, draw: random.Random, seconds: float,
    run: Mapping[str, Any], say: Callable[[str], None],
) -> Counter:
    """The counts of a run that is killed so often, or until its end comes first; see `soak`."""
    workdir, cache, found = folder / "killed", folder / "cache", Counter()
    shutil.rmtree(workdir, ignore_errors=True)
    damaged: list[str] = []
    ended = False
    while found["kills"] < kills and not ended:
        moment = draw.choice(MOMENTS)
        if moment is first_compile:
            shutil.rmtree(cache, ignore_errors=True)
        running = started.start(workdir, **run, cache=cache)
        moment(running, workdir, draw, seconds)
        running.send_signal(signal.SIGKILL)
        output, _ = running.communicate()
        ended = running.returncode == 0
        if ended:
            break
        if running.returncode != -signal.SIGKILL:
            raise AssertionError(f"ended by itself with {running.returncode}:\n{output}")
        name = moment.__name__.replace("_", " ")
        found.update(("kills", f"kills: {name}"))
        log = workdir / "metrics.jsonl"
        found["half lines"] += log.exists() and log.read_bytes()[-1:] not in (b"\n", b"")
        say(f"kill: {name}")
        whole = [path for path in checkpoint.finished(workdir) if not checkpoint.faults_of(path)]
        if draw.random() < 0.4 and len(whole) > 1 and found["corruptions"] < corruptions:
            file, kind = damage(whole[-1], draw)
            damaged.append(str(file))
            found.update(("corruptions", f"corruptions: {kind}"))
            say(f"  {kind}: {file}")
    if not ended:
        started.end(started.start(workdir, **run, cache=cache), seconds=A_RUN_S)
    events = read_events(workdir / "timing.jsonl")
    told = "\n".join(event["text"] for event in events if event["event"] == "notice")
    logs = [(one / "metrics.jsonl").read_bytes() for one in (workdir, folder / "whole")]
    found.update({
        "runs": 1,
        "resumes": sum(event["event"] == "start" and event["examples_seen"] > 0
                       for event in events),
        "undetected": sum(file not in told for file in damaged),
        "bits different": started.bits_different(workdir, folder / "whole"),
        "logs different": logs[0] != logs[1],
    })
    return found


def _damaged_copies(folder: Path, corruptions: int, draw: random.Random) -> Counter:
    """The counts of so many damages to copies of the checkpoints of `folder`/whole; see `soak`.

    Most leave an older checkpoint whole, which must then be the one that is found, with its bits.
    In the others no checkpoint is whole, and this must be said.
    """
    original, copy, found = folder / "whole", folder / "copy", Counter()
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(original, copy)
    paths = checkpoint.finished(copy)
    expected = [checkpoint.load(original, int(path.name)) for path in paths]
    while found["corruptions"] < corruptions:
        # The newest, and as many before it; all of them one time in ten.
        spoiled = len(paths) if draw.random() < 0.1 else draw.randrange(1, len(paths))
        spoiled = min(spoiled, corruptions - found["corruptions"])
        damages = [damage(path, draw) for path in paths[-spoiled:]]
        for _, kind in damages:
            found.update(("corruptions", f"corruptions: {kind}"))
        try:
            newest = checkpoint.find_newest(copy)
            told = "\n".join(newest.faults)
        except Mistake as mistake:
            told = str(mistake)
        else:
            if newest.path in paths[:-spoiled]:
                found["bits different"] += started.bits_between(
                    checkpoint.load(copy, int(newest.path.name)),
                    expected[paths.index(newest.path)])
            else:
                found["undetected"] += 1  # a damaged one was taken
        found["undetected"] += sum(str(file) not in told for file, _ in damages)
        for file, _ in damages:
            file.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(original / file.relative_to(copy), file)
    return found


def damage(path: Path, draw: random.Random) -> tuple[Path, str]:
    """Flips one bit of, cuts short or removes a file of a checkpoint; returns file and kind."""
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.stat().st_size)
    file = draw.choice(files)
    kind = draw.choice(("bit flipped", "file cut short", "file removed"))
    content = bytearray(file.read_bytes())
    if kind == "file removed":
        file.unlink()
    elif kind == "file cut short":
        file.write_bytes(content[: draw.randrange(len(content))])
    else:
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        file.write_bytes(content)
    return file, kind


def add_to_record(path: Path, sittings: list[dict[str, Any]]) -> None:
    """Writes all sittings, and before them the sum of their counts."""
    total: Counter[str] = Counter()
    for sitting in sittings:
        total.update(sitting["counts"])
    record = {"total": dict(sorted(total.items())), "sittings": sittings}
    replace_text(path, json.dumps(record, indent=1) + "\n")


def main() -> None:
    """Prints the counts; status 1 unless nothing was lost."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--corruptions", type=int, default=100)
    parser.add_argument("--run", choices=RUNS, default="digits")
    parser.add_argument("--record", type=Path, help="JSON file to add the counts to")
    parser.add_argument("--seed", type=int, help="the number of sittings before, if not given")
    options = parser.parse_args()
    before = []
    if options.record and options.record.exists():
        before = json.loads(options.record.read_text(encoding="utf-8"))["sittings"]
    seed = len(before) if options.seed is None else options.seed
    run = RUNS[options.run]
    file, config = run.get("file", "configs/digits.py"), ",".join(run["config"])
    sitting = provenance.describe(
        provenance.command_line("tests.soak"), [f"{file}:{config}"]) | {"seed": seed}

    def keep(found: Counter) -> None:
        sitting["counts"] = dict(sorted(found.items()))
        if options.record:
            add_to_record(options.record, [*before, sitting])

    with tempfile.TemporaryDirectory() as folder:
        found = soak(Path(folder), options.kills, options.corruptions, seed, run, after_each=keep)
    for name, count in sorted(found.items()):
        print(f"{name}: {count}")
    sys.exit(any(found[loss] for loss in LOSSES))


if __name__ == "__main__":
    main()
