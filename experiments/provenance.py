"""By which command, on which machine and with which versions runs were trained or measured."""

import contextlib
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
# Those whose versions are noted, where they are installed.
PACKAGES = ("jax", "jaxlib", "flax", "optax", "tensorstore", "numpy", "opencv-python-headless",
            "tensorflow-cpu", "tensorflow", "torch")


def describe(command: Sequence[str], configs: Sequence[str] = ()) -> dict[str, Any]:
    """One training or measurement: its command, revision, machine and versions.

    Args:
        command: the one that makes it.
        configs: those that it trains; none for a measurement.
    """
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "command": shlex.join(command),
        "began": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "revision": _revision(),
        "hardware": _hardware(),
        "versions": versions,
    } | ({"configs": list(configs)} if configs else {})


def add(folder: Path, training: dict[str, Any]) -> None:
    """Adds a training, as `describe` gives it, to those of `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(folder / FILE, json.dumps([*read(folder), training], indent=1) + "\n")


def read(folder: Path) -> list[dict[str, Any]]:
    """The trainings of `folder`, the oldest first; [] where none was noted."""
    path = folder / FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def command_line(module: str) -> list[str]:
    """The running program's command, as a user would type it in the repository."""
    return ["python", "-m", module, *sys.argv[1:]]


def _revision() -> str:
    """The commit, and whether there are uncommitted changes; "unknown" outside a checkout."""
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True,
                              check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + " with uncommitted changes" * bool(changed)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _hardware() -> str:
    """How many cores of which processor this process may use, and JAX's accelerators if any."""
    backend, devices = jax_devices()
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines()
                 if line.startswith("model name")]
        processor = names[0] if names else processor
    return f"{len(own_cores())} cores of {processor}" + f", {devices}" * (backend != "cpu")
