"""ResNet-50 on ImageNet in 30 minutes (section 5.4 of the paper) as one command.

    python launch/thirty_minutes.py NAME --zone=us-central1-a --env=XDG_CACHE_HOME=/dev/shm \\
        --data=gs://BUCKET/tfds --workdir=gs://BUCKET/run

The first slice, 256 cores of TPU v2, trains to the end of the first phase with batch 8192; the
second, 512 cores, goes on from the same workdir with 16 384. The slices are called NAME-first and
NAME-second. Each is deleted as soon as its job has ended, however it ended, unless --keep is given:
an idle pod is dear, and what counts is in the bucket. After Ctrl-C it is left, with a line that
says so. The second slice is asked for when the first has done its work; waiting for it costs
nothing. A run that broke off is continued by the same command, from the second slice on with
--skip-first; with --reuse where its slice is still there, which is then deleted like a new one.

The same on this machine, small, with so many processes x CPU devices:

    python launch/thirty_minutes.py --platform=local --first=1x4 --second=2x4 --data=DIR \\
        --config=configs/imagenet_resnet50.py:thirty_minutes,smoke=true --workdir=/tmp/run

What stands behind a `--` goes to bigbatch.main as it is. With --dry-run the commands are printed,
one a line, and nothing is run.

Exit status: that of the job that ended it, 0 at the end of the run.
"""

import argparse
import re

import commands
import local
import statuses
import tpu_vm


def processes_and_devices(text: str) -> tuple[int, int]:
    """(2, 4) of "2x4". Raises ValueError for anything else."""
    found = re.fullmatch(r"([1-9][0-9]*)x([1-9][0-9]*)", text)
    if not found:
        raise ValueError(f"{text!r}: with --platform=local, --first and --second are processes x "
                         "CPU devices of each, for example 2x4.")
    return int(found[1]), int(found[2])


def train_on_tpu(options: argparse.Namespace, which: str, kind: str, arguments: list[str]) -> int:
    """Makes a slice of its own, trains there, deletes it; returns the job's status."""
    flags = [
        f"{options.name}-{which}", f"--zone={options.zone}", f"--accelerator-type={kind}",
        f"--retry-seconds={options.retry_seconds}", f"--poll-seconds={options.poll_seconds}",
        f"--wait-minutes={options.wait_minutes}", f"--restarts={options.restarts}",
    ]
    if options.project:
        flags.append(f"--project={options.project}")
    flags += ["--spot"] * options.spot + ["--dry-run"] * options.dry_run
    flags += ["--committed-only"] * options.committed_only + ["--reuse"] * options.reuse
    flags += [f"--env={text}" for text in options.env]
    if options.data_disk:
        flags.append(f"--data-disk={options.data_disk}")
    flags += ["--delete-at-end=any"] * (not options.keep)
    return tpu_vm.main(["run", *flags, "--", *arguments])


def train_here(options: argparse.Namespace, which: str, kind: str, arguments: list[str]) -> int:
    """Trains on this machine's CPU; returns the job's status."""
    processes, devices = processes_and_devices(kind)
    return local.run_job(processes, devices, arguments, options)


def train(options: argparse.Namespace, extra: list[str]) -> int:
    """Both parts of the run; returns the status of the last job.

    Raises:
        ValueError: for a mistake in what was asked.
    """
    here = options.platform == "local"
    first = options.first or ("1x4" if here else "v2-256")
    second = options.second or ("2x4" if here else "v2-512")
    if here:
        processes_and_devices(first), processes_and_devices(second)  # before the first is run
        if options.env or options.data_disk:
            raise ValueError("--env and --data-disk are for slices; with --platform=local the "
                             "processes have this terminal's environment.")
    elif not (options.name and options.zone):
        raise ValueError("NAME and --zone are needed for --platform=tpu_vm.")
    start = train_here if here else train_on_tpu
    arguments = [f"--config={options.config}", f"--workdir={options.workdir}", *extra]
    if options.data:
        arguments.insert(1, f"--config.data.dir={options.data}")
    if not options.skip_first:
        stop = f"--stop_after_phase={options.phase}"
        status = start(options, "first", first, [*arguments, stop])
        if status != statuses.STOPPED_AFTER_PHASE and not options.dry_run:
            print(f"launch: the first part ended with {status}, not with "
                  f"{statuses.STOPPED_AFTER_PHASE} after {options.phase}; the second was not begun")
            return status
    return start(options, "second", second, arguments)


def main(argv: list[str]) -> int:
    """The command line."""
    own, extra = commands.split(argv)
    parser = commands.make_parser("thirty_minutes", __doc__)
    parser.add_argument("name", nargs="?", default="", help="of the slices")
    parser.add_argument("--platform", choices=["tpu_vm", "local"], default="tpu_vm")
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--data", default="", help="--config.data.dir of the config")
    parser.add_argument("--config", default="configs/imagenet_resnet50.py:thirty_minutes",
                        help="default configs/imagenet_resnet50.py:thirty_minutes")
    parser.add_argument("--phase", default="noise/1", help="the first slice's last (noise/1)")
    parser.add_argument("--first", default="", help="slice (v2-256), or processes x devices (1x4)")
    parser.add_argument("--second", default="", help="slice (v2-512), or processes x devices (2x4)")
    parser.add_argument("--skip-first", action="store_true", help="begin with the second")
    parser.add_argument("--reuse", action="store_true",
                        help="take slices of these names where they are there")
    parser.add_argument("--keep", action="store_true", help="delete neither slice")
    parser.add_argument("--restarts", type=int, default=100, help="of each part, at most (100)")
    for flag in ("--zone", "--project", "--data-disk"):
        parser.add_argument(flag, default="", help="as for launch/tpu_vm.py")
    commands.add_environment_flag(parser)
    parser.add_argument("--spot", action="store_true", help="as for launch/tpu_vm.py")
    parser.add_argument("--committed-only", action="store_true", help="as for launch/tpu_vm.py")
    parser.add_argument("--wait-minutes", type=int, default=360, help="for each slice (360)")
    parser.add_argument("--poll-seconds", type=float, default=30.0, help="default 30")
    commands.add_flags(parser)
    options = commands.parse(parser, own)
    options.port = 0
    return train(options, extra)


if __name__ == "__main__":
    commands.main(main)
