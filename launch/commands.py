"""The commands of a script: run with retries and one-line errors, or only printed (`--dry-run`)."""

import argparse
import math
import re
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence

import statuses
from repository import ROOT

# What a worker says when it has done what it was asked; the tools' own words are not counted.
ANSWER = "bigbatch: "
LONGEST_PAUSE_SECONDS = 60.0
# The least value of each flag that takes a number, in whichever script.
LEAST = {
    "retry_seconds": 0, "poll_seconds": 0, "wait_minutes": 0, "restarts": 0, "max_restarts": 0,
    "processes": 1, "devices_per_process": 0, "nodes": 1, "cpus_per_gpu": 0, "fruitless": 1,
}


class Failed(Exception):
    """A command that ended with an error; the text is one line with all a person needs.

    Attributes:
        status: its exit status.
        stderr: all that it said there.
    """

    def __init__(self, line: str, status: int, stderr: str):
        said = [text.strip() for text in stderr.splitlines() if text.strip()]
        last = f": {said[-1]}" if said else ""
        super().__init__(f"status {status} from `{line}`{last}")
        self.status, self.stderr = status, stderr


def make_parser(script: str, text: str) -> argparse.ArgumentParser:
    """The command line of launch/SCRIPT.py, whose --help is the docstring `text`."""
    return argparse.ArgumentParser(
        prog=f"launch/{script}.py", description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_actions(
    parser: argparse.ArgumentParser, actions: Mapping[str, str]
) -> dict[str, argparse.ArgumentParser]:
    """A parser for each action (name: what it does), with the flags that all scripts have."""
    subparsers = parser.add_subparsers(dest="action", required=True)
    parsers = {action: subparsers.add_parser(action, help=text, description=text)
               for action, text in actions.items()}
    for one in parsers.values():
        add_flags(one)
    return parsers


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that all scripts have."""
    parser.add_argument("--dry-run", action="store_true",
                        help="print the commands, one a line, and run none of them")
    parser.add_argument("--retry-seconds", type=float, default=5.0,
                        help="pause before a command's first retry; doubles with each (default 5)")


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """The values of a script's own flags.

    Raises:
        ValueError: for a number that is not finite, or below its least value.
    """
    options = parser.parse_args(argv)
    for name, least in LEAST.items():
        number = getattr(options, name, least)
        if not least <= number < math.inf:
            raise ValueError(f"--{name.replace('_', '-')}={number:.15g}: a finite number is "
                             f"needed, {least} or more.")
    return options


def line(command: Sequence[str], stdin: str = "") -> str:
    """The command as a person would type it."""
    return shlex.join(command) + (f" < {shlex.quote(stdin)}" if stdin else "")


def run(
    command: Sequence[str], options: argparse.Namespace, *, assumed: str = "", attempts: int = 1,
    final: str = "", answers: int = 0, stdin: str = "", show: bool = True, capture: bool = True,
) -> str:
    """Runs a command in the repository's root and returns what it printed.

    Args:
        command: program and arguments; no shell reads them.
        options: the script's flags, see `add_flags`. With --dry-run the command is printed only.
        assumed: returned by a dry run.
        attempts: how often it may be run; more than 1 only for what is safe to repeat.
        final: an error that says this is not repeated.
        answers: how many lines that begin with `ANSWER` it has to print; fewer is an error.
        stdin: a file for its standard input.
        show: whether to say that it is run.
        capture: False to leave its output to the terminal, and return "".

    Raises:
        Failed: if it ended with an error, the last time too.
    """
    if options.dry_run:
        print(line(command, stdin))
        return assumed
    pause = options.retry_seconds
    for attempt in range(attempts):
        if show:
            print(f"+ {line(command, stdin)}", file=sys.stderr, flush=True)
        status, output, stderr = _once(command, stdin, capture)
        answered = sum(text.startswith(ANSWER) for text in output.splitlines())
        if status == 0 and answered < answers:
            status, stderr = 1, f"{answered} of {answers} workers answered"
        if status == 0:
            return output
        last = attempt == attempts - 1 or status == 127 or (final and final in stderr)
        if last:
            break
        print(f"launch: {Failed(line(command), status, stderr)}; again in {pause:g} s",
              file=sys.stderr, flush=True)
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
    raise Failed(line(command, stdin), status, stderr)


def _once(command: Sequence[str], stdin: str, capture: bool) -> tuple[int, str, str]:
    """Exit status, standard output and error; the errors are passed on while they come."""
    with (
        tempfile.TemporaryFile() as output,  # a pipe could fill while the errors are read
        open(stdin or "/dev/null", "rb") as given,
    ):
        try:
            process = subprocess.Popen(
                command, cwd=ROOT, stdin=given, stdout=output if capture else None,
                stderr=subprocess.PIPE, text=True, errors="replace",
            )
        except FileNotFoundError:
            return 127, "", f"{command[0]} is not installed, or not on the PATH"
        said: list[str] = []

        def follow() -> None:
            for text in process.stderr:
                said.append(text)
                print(text, end="", file=sys.stderr, flush=True)

        reader = threading.Thread(target=follow, daemon=True)
        reader.start()
        status = process.wait()
        reader.join(timeout=5)
        output.seek(0)
        return status, output.read().decode(errors="replace"), "".join(said)


def split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The script's own arguments, and behind `--` those of bigbatch.main."""
    argv = list(argv)
    if "--" not in argv:
        return argv, []
    cut = argv.index("--")
    return argv[:cut], argv[cut + 1 :]


def add_environment_flag(parser: argparse.ArgumentParser) -> None:
    """The flag of `environment`."""
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE",
                        help="for the job on every host, as XDG_CACHE_HOME=/dev/shm; repeatable")


def environment(options: argparse.Namespace) -> list[str]:
    """The words before the job's command that set its environment; none where nothing is to be set.

    Raises:
        ValueError: if an --env is not NAME=VALUE.
    """
    for text in options.env:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*=[^\n]*", text):
            raise ValueError(f"--env={text}: write --env=NAME=VALUE, in one line.")
    return ["env", *options.env] if options.env else []


def check_job(arguments: Sequence[str]) -> None:
    """Refuses arguments of bigbatch.main that cannot work on several hosts.

    Raises:
        ValueError: if config or workdir is missing, there are two workdirs, or the hosts cannot
            share the workdir.
    """
    given = dict(text.partition("=")[::2] for text in arguments)
    for flag in ("--config", "--workdir"):
        if not given.get(flag):
            raise ValueError(
                f"{flag}=... is missing: bigbatch.main's own flags stand behind a `--`, for "
                "example `-- --config=configs/imagenet_resnet50.py --workdir=gs://BUCKET/RUN`."
            )
    workdirs = [text for text in arguments if re.match("--?workdir(=|$)", text)]
    if len(workdirs) > 1:
        raise ValueError(f"{' '.join(workdirs)}: a job has one workdir; give one of them.")
    if not given["--workdir"].startswith(("gs://", "/")):
        raise ValueError(
            f"--workdir={given['--workdir']}: all hosts write into one workdir; give "
            "gs://BUCKET/RUN, or the absolute path of a disk that they share."
        )
    if any("\n" in text for text in arguments):
        raise ValueError("a line break in an argument of bigbatch.main does not survive the way.")


def double_dollars(arguments: Sequence[str]) -> list[str]:
    """Arguments for systemd and Kubernetes, which fill in `$NAME` and `$(NAME)`: there $ is $$."""
    return [text.replace("$", "$$") for text in arguments]


def main(function: Callable[[list[str]], int]) -> None:
    """Runs a script on the command line and exits with what it returns, errors as one line.

    Exit status: 2 for a mistake in what was asked, 1 where a command failed, 130 after Ctrl-C.
    """
    try:
        sys.exit(function(sys.argv[1:]))
    except ValueError as error:
        status, problem = statuses.MISTAKE, str(error)
    except Failed as error:
        status, problem = statuses.FAILED, str(error)
    except KeyboardInterrupt:
        status, problem = statuses.INTERRUPTED, "interrupted"
    print(f"launch: {problem}", file=sys.stderr)
    sys.exit(status)
