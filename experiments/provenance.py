"""On what, with what and by which command runs were trained: what a record says beside the logs."""

import importlib.metadata
import json
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bigbatch.storage.logs import replace_text
from experiments.figures import REPOSITORY
from experiments.machine import jax_devices, own_cores

FILE = "trainings.json"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def describe(command: Sequence[str], configs: Sequence[str]) -> dict[str, Any]:
    """One training: its command, revision, machine, versions, and the configs it is for."""
    return {
        "command": shlex.join(command),
        "began": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "revision": _revision(),
        "hardware": _hardware(),
        "versions": {"python": platform.python_version()}
        | {package: importlib.metadata.version(package) for package in PACKAGES},
        "configs": list(configs),
    }


def add(folder: Path, training: dict[str, Any]) -> None:
    """Adds a training to those of `folder`: one for each time that something was trained there."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps([*read(folder), training], indent=1) + "\n"
    replace_text(folder / FILE, text)


def read(folder: Path) -> list[dict[str, Any]]:
    """The trainings of `folder`, the oldest first; [] where none was noted."""
    path = folder / FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def command_line(module: str) -> list[str]:
    """The running program's command, as a user would type it in the repository."""
    return ["python", "-m", module, *sys.argv[1:]]


def _revision() -> str:
    """Git's name of the commit, with what is not committed said; "unknown" outside a checkout."""
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True,
                              check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + " with uncommitted changes" * bool(changed)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _hardware() -> str:
    """The processor, how many cores are ours, and JAX's accelerators if there are any."""
    backend, devices = jax_devices()
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines()
                 if line.startswith("model name")]
        processor = names[0] if names else processor
    return f"{len(own_cores())} cores of {processor}" + f", {devices}" * (backend != "cpu")
