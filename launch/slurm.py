"""A job on a cluster that SLURM shares out: one process a GPU, over any number of nodes.

    python launch/slurm.py submit NAME --nodes=2 --gpus-per-node=4 --cpus-per-gpu=8 \\
        --time=04:00:00 --partition=PARTITION -- \\
        --config=configs/imagenet_resnet50.py --config.data.dir=DIR --workdir=DIR

This writes launch/slurm.sbatch, filled in, into the --folder and hands it to `sbatch`; what the job
prints comes to the same folder. The nodes run this checkout as it is then, so it has to lie where
they see it, with its Python. With --dry-run the script and the command are printed, and nothing is
written. Jobs are watched and cancelled with `squeue` and `scancel` (README.md, beside this file).

Some minutes before its time is over (--warn-minutes) SLURM sends the processes SIGUSR1. They save
and end with 42, and the job goes back into the queue and continues, as it does after a kill.
`step` is what the script calls on the first node: it runs srun and hands the job back to SLURM.
"""

import argparse
import os
import re
import shlex
import signal
import string
import subprocess
from collections.abc import Sequence
from pathlib import Path

import commands
import statuses
from repository import ROOT

# What sbatch is told in the words of its own flags, where they are given.
PASSED_ON = {
    "partition": "", "account": "", "qos": "", "mem": "of a node, as 200G",
    "exclude": "nodes not to use", "constraint": "what the nodes must have",
}
JOINING = ("coordinator", "processes", "process")  # flags of bigbatch.main
# sbatch's own words for a time, as the pattern of (days, hours, minutes, seconds).
TIMES = (
    r"()()(\d+)()", r"()()(\d+):(\d+)", r"()(\d+):(\d+):(\d+)",
    r"(\d+)-(\d+)()()", r"(\d+)-(\d+):(\d+)()", r"(\d+)-(\d+):(\d+):(\d+)",
)
LONGEST_WARNING_MINUTES = 1000  # SLURM counts its seconds in 16 bits
# How long after the first process srun ends the last ones. They end by themselves long before,
# unless the first process still saves.
LAST_PROCESS_SECONDS = 3600
ATTEMPTS = 5  # of a question to SLURM's controller, which may be out of reach for a while
# How srun tells of processes that did not end with 0.
ENDED = re.compile(
    r"srun: error: \S+: tasks? [\d,-]+: (?:Exited with exit code (\d+)|(.+?)(?: \(core dumped\))?)"
)
SIGNALS = {signal.strsignal(number): 128 + number for number in signal.valid_signals()}
OUT_OF_MEMORY = "Out Of Memory"


def minutes_of(time: str) -> float:
    """The minutes of a time limit in one of sbatch's six forms. Raises ValueError for another."""
    for form in TIMES:
        if found := re.fullmatch(form, time):
            days, hours, minutes, seconds = (int(text or 0) for text in found.groups())
            return 24 * 60 * days + 60 * hours + minutes + seconds / 60
    raise ValueError(f"--time={time}: write minutes, HOURS:MINUTES:SECONDS, or DAYS-HOURS.")


def check(options: argparse.Namespace, arguments: Sequence[str]) -> None:
    """Refuses what cannot work, before anything is submitted.

    Raises:
        ValueError: for a mistake in what was asked.
    """
    commands.check_job(arguments)
    for text in arguments:
        if text.lstrip("-").partition("=")[0] in JOINING and text.startswith("-"):
            raise ValueError(f"{text}: SLURM itself tells the processes of one another.")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", options.name):
        raise ValueError(f"{options.name}: a job's name has letters, digits, '.', '_' and '-'.")
    gpus_of_node(options)
    check_times(options)
    for text in directives(options):
        if not re.fullmatch(r"""-[^\s"'\\#]+""", text):
            raise ValueError(f"{text}: a flag of sbatch, without spaces, quotes, '\\' and '#'.")
    if not re.fullmatch(r"""[^\s"'\\#%]+""", str(folder(options))):
        raise ValueError(f"--folder={folder(options)}: sbatch misreads spaces, quotes and '%'.")
    for text in options.setup:
        if "\n" in text or not text.strip():
            raise ValueError(f"--setup={text!r}: one line of bash is needed.")
    if not os.access(python(options), os.X_OK):
        raise ValueError(f"--python={options.python}: there is no such program.")


def check_times(options: argparse.Namespace) -> None:
    """Refuses times that cannot be. Raises ValueError."""
    minutes, warning = minutes_of(options.time), options.warn_minutes
    if not 0 < warning < minutes or warning > LONGEST_WARNING_MINUTES:
        raise ValueError(
            f"--warn-minutes={warning:g}: more than 0 is needed, less than --time={options.time}, "
            f"and at most {LONGEST_WARNING_MINUTES}."
        )


def gpus_of_node(options: argparse.Namespace) -> int:
    """How many GPUs each node gives. Raises ValueError unless --gpus-per-node is [KIND:]NUMBER."""
    found = re.fullmatch(r"(?:[\w.-]+:)?([1-9]\d*)", options.gpus_per_node)
    if not found:
        raise ValueError(
            f"--gpus-per-node={options.gpus_per_node}: write a number, or KIND:NUMBER as a100:4."
        )
    return int(found[1])


def folder(options: argparse.Namespace) -> Path:
    """Where the script and what the job prints go."""
    return ROOT / options.folder


def python(options: argparse.Namespace) -> Path:
    """The job's Python, unresolved: its link in a virtual environment says which one it is."""
    return ROOT / options.python


def directives(options: argparse.Namespace) -> list[str]:
    """The flags of sbatch that the user gave, each as one word."""
    passed = [f"--{name}={getattr(options, name)}" for name in PASSED_ON if getattr(options, name)]
    return [*passed, *options.sbatch]


def srun_command(options: argparse.Namespace) -> list[str]:
    """srun for one process a GPU.

    Every process sees all of the job's GPUs on its node, and JAX takes the one of SLURM_LOCALID. So
    they are asked for by node: by task, SLURM would hide all but one, and JAX not find its own.
    """
    gpus = gpus_of_node(options)
    return [
        "srun", "--label", f"--nodes={options.nodes}", f"--ntasks={options.nodes * gpus}",
        f"--ntasks-per-node={gpus}", f"--gpus-per-node={options.gpus_per_node}",
        # srun does not take this one from sbatch since 22.05.
        *([f"--cpus-per-task={options.cpus_per_gpu}"] if options.cpus_per_gpu else []),
        # The processes end by themselves, so that each one's status is its own.
        "--kill-on-bad-exit=0", f"--wait={LAST_PROCESS_SECONDS}",
    ]


def python_command(options: argparse.Namespace, arguments: Sequence[str]) -> list[str]:
    """What each process runs. `env` becomes Python; a shell would get SLURM's warning in its place,
    and end."""
    return [
        *commands.environment(options), str(python(options)), "-u", "-m", "bigbatch.main",
        *arguments,
    ]


def script(options: argparse.Namespace, arguments: Sequence[str]) -> str:
    """launch/slurm.sbatch for this job. Raises ValueError for a mistake in what was asked."""
    check(options, arguments)
    gpus = gpus_of_node(options)
    given = directives(options)
    if options.cpus_per_gpu:
        given.insert(0, f"--cpus-per-task={options.cpus_per_gpu}")
    step = [
        [str(python(options)), "-u", "launch/slurm.py", "step", f"--folder={folder(options)}",
         f"--restarts={options.restarts}", f"--fruitless={options.fruitless}", "--"],
        srun_command(options),
        python_command(options, arguments),
    ]
    values = {
        "name": options.name, "nodes": options.nodes, "gpus": gpus, "time": options.time,
        "gpus_per_node": options.gpus_per_node, "warning": max(1, round(60 * options.warn_minutes)),
        "given": "".join(f"#SBATCH {text}\n" for text in given),
        "output": folder(options) / f"{options.name}-%j.out",
        "setup": "".join(f"{text} || exit {statuses.MISTAKE}\n" for text in options.setup),
        "root": shlex.quote(str(ROOT)), "mistake": statuses.MISTAKE,
        "again": statuses.AGAIN, "step": " \\\n    ".join(map(shlex.join, step)),
    }
    template = string.Template((Path(__file__).parent / "slurm.sbatch").read_text())
    return template.substitute(values)


def submit(options: argparse.Namespace, arguments: Sequence[str]) -> None:
    """Hands the job to SLURM."""
    text = script(options, arguments)
    path = folder(options) / f"{options.name}.sbatch"
    if options.dry_run:
        print(text)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    # Once: after an error the job may have been taken on or not.
    number = commands.run(["sbatch", "--parsable", str(path)], options, assumed="NUMBER").strip()
    if not options.dry_run:
        print(f"launch: job {number.partition(';')[0]}; what it prints comes to "
              f"{folder(options)}/{options.name}-{number.partition(';')[0]}.out")


def step(options: argparse.Namespace, command: Sequence[str]) -> int:
    """Runs srun in the job, hands the job back to SLURM where it goes on, and returns its status.

    SLURM itself starts a job again after a lost node, and after it took the nodes for another one.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if not job or not command:
        raise ValueError("`step` is what the script of `submit` calls, in a job of SLURM.")
    if options.dry_run:
        print(commands.line(command))
        return statuses.FINISHED
    before = newest_checkpoint(command)
    status = statuses.of_job(run_processes(command))
    if not statuses.wants_restart(status):
        return status
    after = newest_checkpoint(command)
    fruitless = count_fruitless(
        options.folder / f"{job}.fruitless", after is not None and after == before)
    restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    asked = ["scontrol", "show", "job", "--oneliner", job]
    shown = commands.run(asked, options, attempts=ATTEMPTS, show=False)
    found = re.search(r"JobState=(\S+) Reason=(\S+)", shown)
    state, reason = found.groups() if found else ("UNKNOWN", "")
    if fruitless >= options.fruitless:
        say(status, f"and {fruitless} starts in a row left no new checkpoint; not started again")
    elif restarts >= options.restarts:
        say(status, f"after {restarts} restarts; not started again")
    elif state != "RUNNING" and reason != "TimeLimit":
        # Cancelled, or SLURM puts it back by itself. Put back here, a cancelled job would go on.
        say(status, f"and SLURM calls it {state}; left to SLURM")
    else:
        say(status, "and goes back into the queue")
        commands.run(["scontrol", "requeue", job], options, attempts=ATTEMPTS)
    return status


def say(status: int, text: str) -> None:
    """A line for whoever reads what the job printed."""
    print(f"launch: the job ended with {status} {text}", flush=True)


def run_processes(command: Sequence[str]) -> list[int]:
    """The statuses of srun's processes that did not end with 0, or srun's own.

    srun itself returns the largest, which may be that of a consequence. What it says of the others
    is read from its words; those of the processes come behind their numbers (--label).
    """
    told: list[int] = []

    def pass_on(number: int, frame: object) -> None:
        told.append(number)
        if len(told) == 1 and running:
            # srun passes this one on; after SIGTERM or SIGHUP it would end the processes itself.
            running[0].send_signal(signal.SIGUSR1)

    running: list[subprocess.Popen] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, pass_on)
    try:
        running.append(subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"))
    except FileNotFoundError as error:
        raise ValueError(f"{command[0]} is not installed, or not on the PATH") from error
    process, found = running[0], []
    if told:  # before there was one
        process.send_signal(signal.SIGUSR1)
    for text in process.stdout:
        print(text, end="", flush=True)
        if ended := ENDED.fullmatch(text.rstrip()):
            number, how = ended.groups()
            known = int(number) if number else SIGNALS.get(
                how, statuses.LOST if how == OUT_OF_MEMORY else None)
            found += [known] if known is not None else []
    status = process.wait()
    return found or [128 - status if status < 0 else status]


def newest_checkpoint(command: Sequence[str]) -> str | None:
    """The name of the run's newest checkpoint, "" without one; None where it cannot be seen."""
    workdir = next(text.partition("=")[2] for text in command if text.startswith("--workdir="))
    if not workdir.startswith("/"):
        return None
    found = [path.name for path in Path(workdir, "checkpoints").glob("*") if path.name.isdigit()]
    return max(found, key=int, default="")


def count_fruitless(path: Path, fruitless: bool) -> int:
    """How many starts in a row left no new checkpoint, with this one; kept in the file `path`."""
    count = 0
    if fruitless:
        count = 1 + (int(path.read_text()) if path.exists() else 0)
        path.write_text(str(count))
    else:
        path.unlink(missing_ok=True)
    return count


def main(argv: list[str]) -> int:
    """The command line."""
    own, arguments = commands.split(argv)
    parser = commands.make_parser("slurm", __doc__)
    actions = commands.add_actions(parser, {
        "submit": "hand the job to SLURM",
        "step": "what the script calls in the job: run srun, and hand the job back to SLURM",
    })
    for one in actions.values():
        one.add_argument("--restarts", type=int, default=100,
                         help="at most, those by SLURM itself included (default 100)")
        one.add_argument("--fruitless", type=int, default=3,
                         help="starts in a row without a new checkpoint, at most (default 3)")
        one.add_argument("--folder", type=Path, default=Path("runs/slurm"),
                         help="for the script and what the job prints (default runs/slurm here)")
    add_submit_flags(actions["submit"])
    options = commands.parse(parser, own)
    if options.action == "step":
        return step(options, arguments)
    submit(options, arguments)
    return statuses.FINISHED


def add_submit_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that describe a job."""
    parser.add_argument("name", help="of the job")
    parser.add_argument("--nodes", type=int, default=1, help="default 1")
    parser.add_argument("--gpus-per-node", required=True, metavar="[KIND:]N", help="4, a100:4, ...")
    parser.add_argument("--cpus-per-gpu", type=int, default=0,
                        help="of each process (default: what the cluster gives, often 1)")
    parser.add_argument("--time", required=True, help="the limit of each start, as sbatch reads it")
    parser.add_argument("--warn-minutes", type=float, default=5.0,
                        help="how long before the limit the processes save and end (default 5)")
    for name, text in PASSED_ON.items():
        parser.add_argument(f"--{name}", default="", help=text or "as sbatch takes it")
    parser.add_argument("--sbatch", action="append", default=[], metavar="FLAG",
                        help="another flag of sbatch, as --sbatch=--reservation=R; repeatable")
    parser.add_argument("--setup", action="append", default=[], metavar="COMMAND",
                        help="a line of bash before the job, as 'module load cuda'; repeatable")
    parser.add_argument("--python", default=".venv/bin/python",
                        help="with bigbatch's packages (default .venv/bin/python here)")
    commands.add_environment_flag(parser)


if __name__ == "__main__":
    commands.main(main)
