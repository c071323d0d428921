"""The code as it travels: one archive of the committed tree, and how a host unpacks it."""

import argparse
import tempfile
from pathlib import Path

import commands


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flag of `pack`."""
    parser.add_argument("--committed-only", action="store_true",
                        help="go without the changes that are not committed, instead of refusing")


def path(name: str) -> Path:
    """Where `pack` writes the archive of a job."""
    return Path(tempfile.gettempdir()) / f"bigbatch-{name}.tar.gz"


def pack(name: str, options: argparse.Namespace) -> Path:
    """Writes the committed tree as bigbatch-NAME.tar.gz into the temporary folder.

    Raises:
        ValueError: if files of the working tree are not committed, and so would stay behind.
    """
    if not options.committed_only:
        changed = commands.run(
            ["git", "status", "--porcelain"], options, show=False
        ).splitlines()
        if changed:
            raise ValueError(
                f"{len(changed)} files are not committed (first `{changed[0].strip()}`) and would "
                "stay behind: commit them, or go without them with --committed-only."
            )
    written = path(name)
    commands.run(["git", "archive", "--format=tar.gz", f"--output={written}", "HEAD"], options)
    return written


def install_script(archive: str) -> str:
    """One line of bash that makes ~/bigbatch and ~/bigbatch-venv of an archive in the home folder.

    May be repeated. uv brings a Python of its own: that of the machines' software can be older than
    the 3.11 that bigbatch needs.
    """
    return " && ".join([
        "rm -rf ~/bigbatch",
        "mkdir ~/bigbatch",
        f"tar -xzf ~/{archive} -C ~/bigbatch",
        "python3 -m pip install --user --quiet uv",
        "python3 -m uv venv --quiet --allow-existing --python 3.12 ~/bigbatch-venv",
        "python3 -m uv pip install --quiet --python ~/bigbatch-venv/bin/python"
        " -r ~/bigbatch/requirements.txt -r ~/bigbatch/requirements-tpu.txt",
        f'echo "{commands.ANSWER}installed on $(hostname)"',
    ])
