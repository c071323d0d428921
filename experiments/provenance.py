"""On what, with what and by which command runs were trained: what a record says beside the logs."""

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
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def describe(
    command: Sequence[str], configs: Sequence[str] = (), packages: Sequence[str] = PACKAGES
) -> dict[str, Any]:
    """One training or measurement: its command, revision, machine and versions.

    Args:
        command: that makes it.
        configs: it is for; none where it trains none.
        packages: whose versions are told, where they are installed.
    """
    versions = {"python": platform.python_version()}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "command": shlex.join(command),
        "began": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "revision": _revision(),
        "hardware": _hardware(),
        "versions": versions,
    } | ({"configs": list(configs)} if configs else {})


def note(folder: Path, module: str, configs: Sequence[str]) -> None:
    """Adds to `folder` that the running program is about to train `configs` there, if any."""
    if not configs:
        return
    folder.mkdir(parents=True, exist_ok=True)
    training = describe(command_line(module), configs)
    replace_text(folder / FILE, json.dumps([*read(folder), training], indent=1) + "\n")


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
