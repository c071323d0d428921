"""Packs what comes back from a machine, and unpacks what goes to it.

    python experiments/gpu/packing.py pack|unpack

$WORK is the folder in which measure.sh works, $OUT what comes back: 8 files of 16 MiB at most, 64
MiB in all. `.gpu/` has what goes there. Needs Python alone, since it runs before all else is there.
"""

import json
import os
import shutil
import sys
import tarfile
from collections.abc import Iterable
from pathlib import Path

WORK, OUT, CAME = Path(os.environ["WORK"]), Path(os.environ["OUT"]), Path(".gpu")
MIB = 2**20
FILE_LIMIT, ALL_LIMIT = int(15.9 * MIB), 63 * MIB
STATES = 2  # unfinished runs whose newest checkpoint comes back; one has 20 MiB
LARGEST_LOG = 12 * MIB


def pack() -> None:
    """Logs, the newest checkpoint of each unfinished run, and compiled programs, into $OUT."""
    _name_revision()
    runs = sorted(WORK.glob("runs/*"))
    logs = [path for folder in (WORK / "logs", *sorted(WORK.glob("bits_*")), WORK / "smoke",
                                WORK / "warm", *runs)
            for path in folder.rglob("*") if path.is_file() and path.name != "lock"
            and path.stat().st_size < LARGEST_LOG
            and "checkpoints" not in path.relative_to(folder).parts]
    logs += WORK.glob("trainings.json")
    packed = OUT / "logs.tar.xz"
    _archive(packed, logs, "w:xz")
    if packed.stat().st_size > FILE_LIMIT:  # by the trace
        _archive(packed, [path for path in logs if "profile" not in path.parts], "w:xz")
    for old in OUT.glob("state*"):
        old.unlink()
    under_way = sorted(((_seen(run), run) for run in runs if _newest(run) and not _over(run)),
                       reverse=True)
    for number, (seen, run) in enumerate(under_way):
        if number >= STATES:
            print(f"left behind, for want of room: {run.name}")
            continue
        whole = WORK / f"state{number}.tar"
        _archive(whole, [path for path in _newest(run).rglob("*") if path.is_file()], "w")
        with whole.open("rb") as file:
            for part, content in enumerate(iter(lambda: file.read(FILE_LIMIT), b"")):
                (OUT / f"{whole.name}.{part}").write_bytes(content)
        print(f"to be continued, {whole.name}: {run.name} from example {seen}")
    programs = [path for path in (WORK / "cache").rglob("*") if path.is_file()]
    whole = WORK / "cache.tar.gz"
    _archive(whole, programs, "w:gz")
    room = min(FILE_LIMIT, ALL_LIMIT - sum(path.stat().st_size for path in OUT.iterdir()))
    if whole.stat().st_size < room:
        shutil.copy(whole, OUT)
    else:
        print(f"compiled programs left behind, for want of room: {whole.stat().st_size} bytes")
    for path in sorted(OUT.iterdir()):
        print(path.name, path.stat().st_size)


def unpack() -> None:
    """The data, and what an earlier time left to go on with, into $WORK."""
    if not (WORK / "data").exists():
        _extract(CAME / "cifar10.tar.xz", WORK / "data.new")
        (WORK / "data.new").rename(WORK / "data")
    resume = CAME / "resume"
    if (resume / "logs.tar.xz").exists():
        _extract(resume / "logs.tar.xz", WORK, ("runs/", "trainings.json"))
    for first in sorted(resume.glob("state*.tar.0")):
        whole = WORK / first.stem
        with whole.open("wb") as file:
            for number in range(len(list(resume.glob(f"{first.stem}.*")))):
                file.write((resume / f"{first.stem}.{number}").read_bytes())
        _extract(whole, WORK)
        print(f"unpacked {whole.name}")
    if (resume / "cache.tar.gz").exists():
        _extract(resume / "cache.tar.gz", WORK)


def _archive(path: Path, members: Iterable[Path], mode: str) -> None:
    with tarfile.open(path, mode) as archive:
        for member in members:
            archive.add(member, member.relative_to(WORK))


def _extract(path: Path, folder: Path, beginnings: tuple[str, ...] = ("",)) -> None:
    with tarfile.open(path) as archive:
        archive.extractall(folder, [member for member in archive
                                    if member.name.startswith(beginnings)], filter="data")


def _name_revision() -> None:
    """Trainings here are outside of a checkout; `.gpu/revision` knows of which they are."""
    noted, revision = WORK / "trainings.json", CAME / "revision"
    if noted.exists() and revision.exists():
        trainings = json.loads(noted.read_text(encoding="utf-8"))
        for training in trainings:
            if training["revision"] == "unknown":
                training["revision"] = revision.read_text(encoding="utf-8").strip()
        noted.write_text(json.dumps(trainings, indent=1) + "\n", encoding="utf-8")


def _newest(run: Path) -> Path | None:
    """Its newest checkpoint."""
    saved = sorted(path for path in run.glob("checkpoints/*") if path.name.isdigit())
    return saved[-1] if saved else None


def _seen(run: Path) -> int:
    """The examples that it had seen when it logged last."""
    log = run / "metrics.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    return json.loads(lines[-1])["examples_seen"] if lines else 0


def _over(run: Path) -> bool:
    phases = json.loads((run / "config.json").read_text(encoding="utf-8"))["phases"]
    return _seen(run) >= phases[-1]["end_example"]


if __name__ == "__main__":
    {"pack": pack, "unpack": unpack}[sys.argv[1]]()
