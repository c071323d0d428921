"""A job on a Cloud TPU slice as a managed job of SkyPilot.

    python launch/sky.py launch NAME --accelerator-type=v2-256 --spot \\
        --env=XDG_CACHE_HOME=/dev/shm -- \\
        --config=configs/imagenet_resnet50.py:thirty_minutes \\
        --config.data.dir=gs://BUCKET/tfds --workdir=gs://BUCKET/run

`python launch/sky.py task NAME --accelerator-type=... -- ...` prints the task (launch/sky.yaml
filled in) and runs nothing. SkyPilot makes the slice, brings the committed tree, starts the one
command on every host, makes the slice again when it is taken away, starts again after 42, and
deletes the slice at the end. With --dry-run the commands are printed, one a line, and none is run.
Jobs are watched and cancelled with `sky jobs` itself (README.md, beside this file).
"""

import argparse
import json
import shlex
import string
import tempfile
from collections.abc import Sequence
from pathlib import Path

import accelerators
import archive
import commands
import statuses


def run_script(arguments: Sequence[str], options: argparse.Namespace) -> str:
    """Bash that becomes the job."""
    return " ".join([
        "cd ~/bigbatch && exec", *map(shlex.quote, commands.environment(options)),
        "~/bigbatch-venv/bin/python", shlex.join(["-u", "-m", "bigbatch.main", *arguments]),
    ])


def task(options: argparse.Namespace, arguments: Sequence[str]) -> str:
    """launch/sky.yaml for this job. Raises ValueError for a mistake in what was asked."""
    commands.check_job(arguments)
    kind = accelerators.parse(options.accelerator_type)
    packed = archive.path(options.name)
    values = {
        "name": options.name, "infra": options.infra, "accelerator": f"tpu-{kind.name}",
        "runtime_version": options.runtime_version or kind.tpu.runtime_version,
        "remote_archive": f"~/{packed.name}", "archive": str(packed),
        "setup": archive.install_script(packed.name), "run": run_script(arguments, options),
    }
    template = string.Template((Path(__file__).parent / "sky.yaml").read_text())
    # JSON's strings are YAML's.
    return template.substitute(
        {key: json.dumps(value) for key, value in values.items()},
        spot=json.dumps(options.spot), again=statuses.AGAIN,
    )


def launch(options: argparse.Namespace, arguments: Sequence[str]) -> None:
    """Hands the task to SkyPilot."""
    text = task(options, arguments)
    archive.pack(options.name, options)
    path = Path(tempfile.gettempdir()) / f"bigbatch-{options.name}.sky.yaml"
    if not options.dry_run:
        path.write_text(text)
    # Once: after an error the job may have been taken on or not.
    commands.run(["sky", "jobs", "launch", str(path), f"--name={options.name}", "--yes",
                  "--detach-run"], options, capture=False)


def main(argv: list[str]) -> int:
    """The command line."""
    own, arguments = commands.split(argv)
    parser = commands.make_parser("sky", __doc__)
    for one in commands.add_actions(parser, {
        "task": "print the task", "launch": "hand the job to SkyPilot",
    }).values():
        one.add_argument("name", help="of the job")
        archive.add_flags(one)
        commands.add_environment_flag(one)
        one.add_argument("--accelerator-type", required=True, help="v2-256, v5litepod-16, ...")
        one.add_argument("--runtime-version", default="", help="default: what fits the type")
        one.add_argument("--infra", default="gcp", help="gcp, gcp/REGION or gcp/REGION/ZONE")
        one.add_argument("--spot", action="store_true")
    options = commands.parse(parser, own)
    if options.action == "task":
        print(task(options, arguments), end="")
    else:
        launch(options, arguments)
    return 0


if __name__ == "__main__":
    commands.main(main)
