"""The programs as commands of an installed package: each does what `python -m` does."""

import os
import runpy
import sys


def train() -> None:
    """The command `bigbatch`."""
    _run("bigbatch.main")


def plan() -> None:
    """The command `bigbatch-plan`."""
    _run("bigbatch.plan")


def evaluate() -> None:
    """The command `bigbatch-evaluate`."""
    _run("bigbatch.evaluate")


def export() -> None:
    """The command `bigbatch-export`."""
    _run("bigbatch.export")


def branch() -> None:
    """The command `bigbatch-branch`."""
    _run("bigbatch.branch")


def _run(module: str) -> None:
    if not sys.flags.safe_path:
        # The working directory in the place of the command's own folder: a config may name models
        # and data that are in it.
        sys.path[0] = os.getcwd()
    # As __main__, so that --help, flags, exit statuses and processes spawned are the same.
    runpy.run_module(module, run_name="__main__", alter_sys=True)
