"""Published records: the logs of runs, kept for the numbers that were published from them.

A record is a folder with runs.tar.gz (each run's config with its phases, metrics and times),
trainings.json (command, revision, machine, versions), and the tables and pictures. Figures are
drawn from a record as from the workdir that it was made of.
"""

import contextlib
import gzip
import io
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bigbatch.mistake import Mistake
from bigbatch.storage.logs import read_events
from experiments import provenance

ARCHIVE = "runs.tar.gz"


def keep(workdir: Path, folders: Sequence[Path], record: Path) -> None:
    """Keeps the logs of runs that are over.

    Args:
        workdir: the folder in which they were trained, with `trainings.json`.
        folders: the runs' own, inside `workdir`.
        record: the folder to write.

    Raises:
        Mistake: if a run is missing, or `trainings.json`, which says how they were trained.
    """
    if missing := [folder for folder in folders if not folder.is_dir()]:
        raise Mistake(f"{missing[0]} is not there: a record is made from a workdir's own runs.")
    if not provenance.read(workdir):
        raise Mistake(f"{workdir} has no {provenance.FILE}: no record can say how it was made.")
    record.mkdir(parents=True, exist_ok=True)
    shutil.copy(workdir / provenance.FILE, record / provenance.FILE)
    # No times of writing are in it, so that the same logs make the same file.
    beside = record / (ARCHIVE + ".new")  # a stop while writing leaves the old one whole
    with (
        beside.open("wb") as file,
        gzip.GzipFile("", "wb", 9, file, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w") as archive,
    ):
        for folder in sorted(folders):
            inside = folder.relative_to(workdir).as_posix()
            for name, text in (
                ("config.json", _without_place((folder / "config.json").read_text("utf-8"))),
                ("metrics.jsonl", _lines(read_events(folder / "metrics.jsonl"))),
                ("timing.jsonl", _lines(_times(folder / "timing.jsonl"))),
            ):
                member = tarfile.TarInfo(f"{inside}/{name}")
                content = text.encode()
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    os.replace(beside, record / ARCHIVE)


def is_record(folder: Path) -> bool:
    """Whether a folder is a record, and no workdir."""
    return (folder / ARCHIVE).exists() and not (folder / "runs").is_dir()


@contextlib.contextmanager
def opened(folder: Path) -> Iterator[Path]:
    """A folder with the runs of a workdir or of a record, which exists during the block.

    Raises:
        Mistake: if there are none.
    """
    if (folder / "runs").is_dir():
        yield folder
    elif is_record(folder):
        with tempfile.TemporaryDirectory() as unpacked, tarfile.open(folder / ARCHIVE) as archive:
            archive.extractall(unpacked, filter="data")
            yield Path(unpacked)
    else:
        raise Mistake(
            f"{folder} holds neither runs nor {ARCHIVE}: it is no workdir of experiments.reproduce "
            "and no record."
        )


def _without_place(saved: str) -> str:
    """The text of a config.json, in which the data's folder is called "data" wherever it was."""
    run = json.loads(saved)
    if run["config"]["data"].get("dir"):
        run["config"]["data"]["dir"] = "data"
    return json.dumps(run, indent=1) + "\n"


def _lines(events: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(event) + "\n" for event in events)


def _times(path: Path) -> list[dict[str, Any]]:
    """The events of timing.jsonl, with hundreds of events on speed added up into one."""
    events = read_events(path)
    speeds = [event for event in events if event["event"] == "speed"]
    kept = [event for event in events if event["event"] != "speed"]
    if speeds:
        kept.append({"event": "speed", "examples_seen": speeds[-1]["examples_seen"],
                     "updates": sum(event["updates"] for event in speeds),
                     "seconds": round(sum(event["seconds"] for event in speeds), 3)})
    return kept
