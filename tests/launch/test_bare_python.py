"""The scripts of launch/ need nothing but Python: no package, and no folder to start them in."""

import os
import subprocess
import sys

import pytest

from tests.support.launch_standins import BARE, REPOSITORY

JOB = ("--", "--config=configs/digits.py:increase", "--workdir=gs://bucket/run")
DRY_RUNS = {
    "gke": ("apply", "n", "--tpu-type=v6e-64", "--image=i", *JOB),
    "local": JOB,
    "sky": ("launch", "n", "--accelerator-type=v5litepod-16", "--committed-only", *JOB),
    "slurm": ("submit", "n", "--gpus-per-node=4", "--time=04:00:00", f"--python={sys.executable}",
              *JOB),
    "thirty_minutes": ("n", "--zone=z", "--workdir=gs://bucket/run", "--committed-only"),
    "tpu_vm": ("run", "n", "--zone=z", "--accelerator-type=v2-256", "--committed-only", *JOB),
}


def dry(arguments):
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    return [*arguments[:cut], "--dry-run", *arguments[cut:]]


def test_the_bare_python_finds_no_package_and_every_script_is_tried():
    found = subprocess.run([*BARE, "-c", "import jax"], text=True, capture_output=True)
    assert "ModuleNotFoundError" in found.stderr
    scripts = [path.stem for path in sorted((REPOSITORY / "launch").glob("*.py"))
               if "__main__" in path.read_text()]
    assert scripts == sorted(DRY_RUNS)


@pytest.mark.parametrize("script", DRY_RUNS)
def test_a_script_runs_without_packages_from_anywhere(tmp_path, script):
    for arguments in (["--help"], dry(DRY_RUNS[script])):
        done = subprocess.run(
            [*BARE, REPOSITORY / f"launch/{script}.py", *arguments], cwd=tmp_path, text=True,
            capture_output=True, timeout=60, env=os.environ | {"PATH": "/usr/bin:/bin"},
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout and not done.stderr
