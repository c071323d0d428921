"""Whether the packages are there that training and drawing need, and new enough.

    python experiments/gpu/packages.py

Prints them, and ends with status 1 where one is missing or older than pyproject.toml allows.
"""

import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.requirements import Requirement

IMPORTED = ("import bigbatch.main, tensorboardX, experiments.reproduce, experiments.speed.table; "
            "from tensorflow_datasets.core.read_only_builder import builder_from_files")


def wrong() -> list[str]:
    """What is missing, too old, or cannot be imported; a text each."""
    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = []
    for text in [*project["dependencies"], *project["optional-dependencies"]["plots"]]:
        requirement = Requirement(text)
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            found.append(f"{requirement.name} is missing")
            continue
        print(requirement.name, installed)
        if not requirement.specifier.contains(installed, prereleases=True):
            found.append(f"{requirement.name} {installed} is not {requirement.specifier}")
    tried = subprocess.run([sys.executable, "-c", IMPORTED], capture_output=True, text=True)
    if tried.returncode:
        found.append(tried.stderr.strip().splitlines()[-1])
    return found


if __name__ == "__main__":
    print("\n".join(missing := wrong()) or "all there")
    sys.exit(bool(missing))
