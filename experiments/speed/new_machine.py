"""How long a new machine takes to its first update, where the run's bucket has its programs.

The bucket is the stand-in of the tests, on this machine, so a real one adds the time in which it
sends the programs, whose bytes are among the seconds of the record.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bigbatch.storage.logs import read_events
from experiments.figures import REPOSITORY
from experiments.speed.measure import Measurement, ratios
from experiments.speed.starts import NETWORKS
from tests.support.bucket_server import BucketServer

RUN = "bucket/run/"
REPEATS = {"digits WRN-10-1": 3, "WRN-16-4": 3, "ResNet-50": 1}  # at most: compiling takes long


def new_machine(repeats: int, short: bool) -> list[Measurement]:
    """The whole start to the first update where a bucket has the programs, over one where not.

    Each start is a process without any folder of an earlier one. A start without programs comes
    before each start with those that it left.
    """
    found = []
    for name, at_most in REPEATS.items() if not short else [("digits WRN-10-1", 1)]:
        config, _ = NETWORKS[name]
        seconds: dict[str, list[float]] = {"without programs": [], "with programs": []}
        sizes = []
        for _ in range(min(repeats, at_most)):
            server = BucketServer("bucket")
            try:
                seconds["without programs"].append(_start(config, server, "compiled"))
                for below in server.names(RUN):  # nothing else, so that both are new runs
                    if not below.startswith("programs/"):
                        del server.objects[RUN + below]
                sizes.append(sum(len(content) for content, _ in server.objects.values()))
                seconds["with programs"].append(_start(config, server, "bucket"))
            finally:
                server.close()
        found.append(Measurement(
            "start to the first update on a new machine, programs in the bucket beside none",
            name, "", "x", ratios(seconds["with programs"], seconds["without programs"]),
            f"{max(sizes) / 1e6:.1f} MB of programs", seconds))
    return found


def _start(config: str, server: BucketServer, source: str) -> float:
    """Seconds from the command to the end of the first update, on an empty disk.

    Raises:
        RuntimeError: with the run's output, if it fails, or has its programs from elsewhere.
    """
    with tempfile.TemporaryDirectory() as folder:
        disk = Path(folder)
        command = [
            sys.executable, "-m", "bigbatch.main",
            f"--config={config},recipe.falls=(),recipe.warmup_epochs=0,tensorboard=false",
            "--workdir=gs://bucket/run", f"--compilation_cache={disk / 'programs'}",
        ]
        began = time.perf_counter()
        with (disk / "output.txt").open("w") as file:
            child = subprocess.Popen(
                command, cwd=REPOSITORY, stdout=file, stderr=subprocess.STDOUT,
                env=os.environ | server.environment() | {"TMPDIR": folder})
        while not (event := _phase_event(disk)) and child.poll() is None:
            time.sleep(0.005)
        first = time.perf_counter() - began
        if child.wait() or not event or {
                program["from"] for program in event["programs"].values()} != {source}:
            raise RuntimeError(f"{' '.join(command)} ended with {child.returncode}, {event}:\n"
                               f"{(disk / 'output.txt').read_text()}")
    return first


def _phase_event(disk: Path) -> dict | None:
    """What the run writes at the end of its first update, in the mirror of its workdir."""
    return next((event for log in disk.glob("bigbatch-*/timing.jsonl")
                 for event in read_events(log) if event["event"] == "phase"), None)
