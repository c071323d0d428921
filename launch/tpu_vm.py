"""A job on a Cloud TPU VM slice, made as a queued resource.

All of it, watched to the job's end, made again where a spot slice is taken away:

    python launch/tpu_vm.py run NAME --zone=us-central1-a --accelerator-type=v2-256 --spot \\
        --env=XDG_CACHE_HOME=/dev/shm --delete-at-end -- \\
        --config=configs/imagenet_resnet50.py:thirty_minutes \\
        --config.data.dir=gs://BUCKET/tfds --workdir=gs://BUCKET/run

Or step by step, with the same NAME and --zone:

    python launch/tpu_vm.py create NAME --zone=ZONE --accelerator-type=v5litepod-16
    python launch/tpu_vm.py install NAME --zone=ZONE     # the committed tree, on all hosts
    python launch/tpu_vm.py start NAME --zone=ZONE -- --config=... --workdir=gs://BUCKET/run
    python launch/tpu_vm.py status NAME --zone=ZONE
    python launch/tpu_vm.py logs NAME --zone=ZONE        # follows; Ctrl-C ends only the following
    python launch/tpu_vm.py stop NAME --zone=ZONE        # saves, and the job ends with 42
    python launch/tpu_vm.py delete NAME --zone=ZONE

ImageNet does not fit on a host's boot disk: --env=XDG_CACHE_HOME=/dev/shm copies it into memory,
--data-disk=projects/P/zones/Z/disks/D has it read from a disk (README.md, beside this file).

The job is the systemd unit `bigbatch` on every host, so it outlives the ssh that started it, keeps
its exit status, and is told by systemd when the machine is about to go. `run` only watches: after
Ctrl-C, or with the laptop closed, the job goes on, and the same command with --reuse added watches
again.
With --dry-run the commands of an undisturbed run are printed, one a line, and nothing is run.

Nothing is deleted unasked: `delete` deletes what it names; `create` and `run` delete a slice of
their own that did not come up, `run` one of its own that was taken away, and with --delete-at-end
the one that has done its work, also where it was there before (--reuse).

Exit status of `run`: the job's (see bigbatch/job/statuses.py); 1 where a command failed, 2 for a
mistake.
"""

import argparse
import contextlib
import hashlib
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import accelerators
import archive
import commands
import queued_resource
import statuses

SILENT_POLLS = 10  # a machine that is restarted is silent for some minutes
_SHOWN = "LoadState,ActiveState,SubState,ExecMainCode,ExecMainStatus"


def ssh(options: argparse.Namespace, script: str, worker: str = "all") -> list[str]:
    """gcloud's command that runs a line of bash on the workers."""
    return ["gcloud", "compute", "tpus", "tpu-vm", "ssh", options.name, f"--worker={worker}",
            f"--command={script}", *queued_resource.where(options)]


_SUBSTATE = '"$(systemctl show bigbatch --value --property=SubState)"'
_BUSY = '{ echo "a job runs on $(hostname): stop it first" >&2; exit 1; }'
_IDLE = f"[ {_SUBSTATE} != running ] || {_BUSY}"
DATA = "/mnt/bigbatch"
# By its label: what the device is called depends on the machine. Without reading the journal, which
# would be written to.
_MOUNT = (f"sudo mkdir -p {DATA} && {{ mountpoint -q {DATA} || "
          f"sudo mount -o ro,noload LABEL=bigbatch {DATA}; }}")


def ask(
    options: argparse.Namespace, script: str, hosts: int, attempts: int = 5, show: bool = True
) -> list[str]:
    """What each worker answers to a script that may be repeated; fewer answers are an error."""
    output = commands.run(ssh(options, script), options, attempts=attempts, final="stop it first",
                          answers=hosts, show=show)
    return sorted(
        text.removeprefix(commands.ANSWER).strip()
        for text in output.splitlines() if text.startswith(commands.ANSWER)
    )


def install(options: argparse.Namespace, hosts: int, packed: Path) -> None:
    """Brings the packed code and its packages onto all workers."""
    commands.run(
        ["gcloud", "compute", "tpus", "tpu-vm", "scp", str(packed), f"{options.name}:",
         "--worker=all", *queued_resource.where(options)],
        options, attempts=5,
    )
    ask(options, f"{_IDLE} && {archive.install_script(packed.name)}", hosts)


def start_script(arguments: Sequence[str], options: argparse.Namespace) -> str:
    """Bash that starts the job as a systemd unit, once however often it is run.

    The unit's description is a digest of the command: where the same job runs already there is
    nothing to do, where another one does that is an error. A data disk is mounted first.
    """
    job = ["-u", "-m", "bigbatch.main", *arguments]
    environment = commands.environment(options)
    digest = hashlib.sha256(shlex.join([*environment, *job]).encode()).hexdigest()[:12]
    unit = " ".join([
        "sudo systemd-run --quiet --unit=bigbatch", f"--description={digest}",
        '--uid="$(id -u)" --gid="$(id -g)" --working-directory="$HOME/bigbatch"',
        "--remain-after-exit",  # else the status of one that ended well is forgotten
        # SIGTERM to the job itself only: its data workers have to live until it has saved.
        "--property=KillMode=mixed --property=TimeoutStopSec=300",
        "--property=LimitMEMLOCK=infinity",  # libtpu pins memory; a service may pin little
        *map(shlex.quote, commands.double_dollars(environment)),
        '"$HOME/bigbatch-venv/bin/python"', shlex.join(commands.double_dollars(job)),
    ])
    mount = f"{_MOUNT} && " if options.data_disk else ""
    return (
        f"case {_SUBSTATE} in running) "
        f'[ "$(systemctl show bigbatch --value --property=Description)" = {digest} ] || {_BUSY} ;; '
        "*) sudo systemctl stop bigbatch 2>/dev/null; "
        f"sudo systemctl reset-failed bigbatch 2>/dev/null; {mount}{unit} ;; esac "
        f'&& echo "{commands.ANSWER}started on $(hostname)"'
    )


STATUS_SCRIPT = (
    f'echo "{commands.ANSWER}$(hostname)'
    f' $(systemctl show bigbatch --property={_SHOWN} | tr "\\n" " ")"'
)
STOP_SCRIPT = (
    f'sudo systemctl stop bigbatch; echo "{commands.ANSWER}stopped on $(hostname)"'
)


def read_status(answer: str) -> tuple[str, int | None]:
    """A worker's name and its process's exit status, None while it runs, from STATUS_SCRIPT."""
    host, *pairs = answer.split()
    unit = dict(pair.partition("=")[::2] for pair in pairs)
    if missing := set(_SHOWN.split(",")) - set(unit):
        raise commands.Failed("systemctl show bigbatch", 0, f"no {missing} in {answer!r}")
    if unit["LoadState"] == "not-found":
        return host, statuses.LOST
    if unit["ActiveState"] not in ("failed", "inactive") and unit["SubState"] != "exited":
        return host, None
    # As of waitid: 1 for a process that exited, 2 and 3 for a killed one; 0 if none has ended.
    code, status = unit["ExecMainCode"], int(unit["ExecMainStatus"])
    if code == "0":
        return host, statuses.LOST
    if code != "1":
        return host, 128 + status
    # systemd gives 200 to 245 to what it could not start (203: no such program), and no shell is
    # there that would turn a signal into a status over 128.
    return host, status if status <= 128 else statuses.FAILED


def job_runs(options: argparse.Namespace) -> bool:
    """Whether a job runs on a worker of the slice."""
    answers = ask(options, STATUS_SCRIPT, queued_resource.count_hosts(options))
    return any(read_status(answer)[1] is None for answer in answers)


def watch(options: argparse.Namespace, hosts: int) -> int:
    """Waits for the job's end and returns its status.

    Raises:
        commands.Failed: if the slice is gone, or could not be reached ten times.
    """
    before, silent = None, 0
    while True:
        answers = []
        try:
            slice_state = queued_resource.state(options)
            if slice_state not in queued_resource.GONE:
                answers = ask(options, STATUS_SCRIPT, hosts, attempts=1, show=False)
        except commands.Failed as error:
            silent += 1
            if silent == SILENT_POLLS:
                raise
            print(f"launch: {error}", file=sys.stderr, flush=True)
            time.sleep(options.poll_seconds)
            continue
        silent = 0
        if slice_state in queued_resource.GONE:
            looked = commands.line(queued_resource.command("describe", options))
            raise commands.Failed(looked, 0, f"{options.name} is {slice_state or 'gone'}")
        if options.dry_run:
            return statuses.FINISHED
        now = [read_status(answer) for answer in answers]
        ended = {host: status for host, status in now if status is not None}
        if ended != before:
            print(f"launch: {hosts - len(ended)} of {hosts} workers run"
                  + "".join(f"; {host}: {status}" for host, status in list(ended.items())[:4]),
                  flush=True)
        before = ended
        if len(ended) == hosts:
            return statuses.of_job(ended.values())
        time.sleep(options.poll_seconds)


def logs_command(options: argparse.Namespace, lines: int, follow: bool) -> list[str]:
    """gcloud's command that shows what the job printed on one worker."""
    script = f"sudo journalctl --unit=bigbatch --output=cat --lines={lines}" + " --follow" * follow
    return ssh(options, script, worker=getattr(options, "worker", "0"))


def run(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Makes the slice, runs the job on it to its end, and returns the job's status.

    Where the slice is taken away and was made here, another one is made; where the job asks for it
    or was killed, it is started again; both together at most --restarts times.

    Raises:
        ValueError: for a mistake in what was asked, before anything is made.
        commands.Failed: if a command failed and the slice is still there.
    """
    commands.check_job(arguments)
    accelerators.parse(options.accelerator_type)
    starting = start_script(arguments, options)
    packed = archive.pack(options.name, options)
    mine = queued_resource.create(options)
    # Below a job that runs already the code stays; `start_script` sees whether it is this one.
    installed = not mine and job_runs(options)
    began, used, left = time.monotonic(), 0.0, options.restarts
    while True:
        try:
            hosts = queued_resource.count_hosts(options)
            if not installed:
                install(options, hosts, packed)
                installed = True
            ask(options, starting, hosts)
            status = watch(options, hosts)
        except commands.Failed:
            now = "out of reach"
            with contextlib.suppress(commands.Failed):
                now = queued_resource.state(options)
            if now not in queued_resource.GONE or not mine or not left:
                _end(options, None, used + time.monotonic() - began)
                raise
            print(f"launch: {options.name} was taken away ({now or 'gone'}); making it again",
                  flush=True)
            used += time.monotonic() - began
            queued_resource.delete(options)
            queued_resource.request(options)
            began, installed = time.monotonic(), False
        else:
            if not statuses.wants_restart(status) or not left:
                break
            print(f"launch: the job ended with {status}; started again", flush=True)
        left -= 1
    _end(options, status, used + time.monotonic() - began)
    return status


def _end(options: argparse.Namespace, status: int | None, seconds: float) -> None:
    """Last words of a job, None for one that was lost sight of, and of its slice."""
    if status is not None and status not in statuses.SUCCESS:
        with contextlib.suppress(commands.Failed):
            commands.run(logs_command(options, 20, follow=False), options, capture=False)
    delete_it = options.delete_at_end == "any" or (
        options.delete_at_end == "success" and status in statuses.SUCCESS
    )
    if delete_it:
        try:
            queued_resource.delete(options)
        except commands.Failed:
            print(f"launch: {standing(options)}", flush=True)
            raise
    if options.dry_run:
        return
    chips = accelerators.parse(options.accelerator_type).chips
    print(f"launch: {chips} chips for {seconds / 3600:.2f} hours are "
          f"{chips * seconds / 3600:.1f} chip-hours; the job "
          + ("was lost sight of" if status is None else f"ended with {status}"), flush=True)
    if not delete_it:
        print(f"launch: {standing(options)}", flush=True)


def standing(options: argparse.Namespace) -> str:
    """Says that the slice is still there, and how it is deleted."""
    command = commands.line(queued_resource.command("delete", options, "--force"))
    return f"{options.name} is left as it is and costs what it costs; to delete: {command}"


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The flags, without those of bigbatch.main. Raises ValueError for a number out of range."""
    parser = commands.make_parser("tpu_vm", __doc__)
    for action, one in commands.add_actions(parser, {
        "create": "make the slice and wait until it is there",
        "install": "bring the committed tree and its packages onto all hosts",
        "start": "start the job on all hosts",
        "status": "the slice's state and each host's",
        "logs": "follow the job's output on one host",
        "stop": "SIGTERM to the job on all hosts; it saves and ends with 42 (a `run` elsewhere "
                "would start it again)",
        "delete": "delete the slice",
        "run": "create, install, start, watch to the end; a slice of its own that was taken away "
               "is deleted and made again",
    }).items():
        one.add_argument("name", help="of the slice and its request")
        one.add_argument("--zone", required=True)
        one.add_argument("--project", default="", help="default: gcloud's")
        one.add_argument("--poll-seconds", type=float, default=30.0, help="default 30")
        if action in ("create", "run"):
            one.add_argument("--accelerator-type", required=True, help="v2-256, v5litepod-16, ...")
            one.add_argument("--runtime-version", default="", help="default: what fits the type")
            one.add_argument("--spot", action="store_true")
            one.add_argument("--wait-minutes", type=int, default=360,
                             help="how long to wait for the slice (default 360)")
            one.add_argument("--reuse", action="store_true",
                             help="take the slice of that name where it is there")
        if action in ("install", "run"):
            archive.add_flags(one)
        if action in ("start", "run"):
            commands.add_environment_flag(one)
        if action in ("create", "start", "run"):
            one.add_argument("--data-disk", default="", metavar="projects/P/zones/Z/disks/D",
                             help=f"a disk with the label `bigbatch`, read on all hosts in {DATA}")
        if action == "logs":
            one.add_argument("--worker", default="0", help="default 0")
        if action == "run":
            one.add_argument("--restarts", type=int, default=100, help="at most (default 100)")
            one.add_argument("--delete-at-end", nargs="?", const="success", default="",
                             choices=["success", "any"],
                             help="delete the slice after status 0 or 3; any: however it ended; "
                                  "with --reuse, one that was there before too")
    return commands.parse(parser, argv)


def main(argv: list[str]) -> int:
    """The command line."""
    own, arguments = commands.split(argv)
    options = parse(own)
    try:
        return _act(options, arguments)
    except (ValueError, commands.Failed):
        raise  # before anything is made, or with what has become of the slice told already
    except BaseException:  # Ctrl-C, or an error that nobody expected
        if options.action in ("create", "run"):
            print(f"\nlaunch: {standing(options)}", file=sys.stderr)
        raise


def _act(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    if options.action == "run":
        return run(options, arguments)
    if options.action == "create":
        queued_resource.create(options)
    elif options.action == "install":
        packed = archive.pack(options.name, options)
        install(options, queued_resource.count_hosts(options), packed)
    elif options.action == "start":
        commands.check_job(arguments)
        starting = start_script(arguments, options)
        ask(options, starting, queued_resource.count_hosts(options))
    elif options.action == "status":
        print_status(options)
    elif options.action == "logs":
        commands.run(logs_command(options, 100, follow=True), options, capture=False)
    elif options.action == "stop":
        ask(options, STOP_SCRIPT, queued_resource.count_hosts(options))
    elif options.action == "delete":
        queued_resource.delete(options)
    return 0


def print_status(options: argparse.Namespace) -> None:
    """Prints the slice's state, and each worker's where it is there."""
    now = queued_resource.state(options)
    if not options.dry_run:
        print(f"{options.name}: {now or 'not there'}")
    if now != "ACTIVE":
        return
    for answer in ask(options, STATUS_SCRIPT, queued_resource.count_hosts(options)):
        host, status = read_status(answer)
        ended = "has no job" if "not-found" in answer else f"ended with {status}"
        print(f"{host}: {'runs' if status is None else ended}")


if __name__ == "__main__":
    commands.main(main)
