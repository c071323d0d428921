"""Several processes of bigbatch.main on this machine, as one job.

    python launch/local.py --processes=2 --devices-per-process=4 --restarts=3 -- \\
        --config=configs/digits.py:increase --workdir=/tmp/run

Use the Python that has bigbatch's packages (.venv/bin/python). Each process has that many CPU
devices; with --devices-per-process=0 those that JAX finds. Relative paths begin in the folder that
this is called in. SIGTERM and Ctrl-C are passed on as one
SIGTERM, so that all save and the job ends with 42; a second one kills. Each line is printed behind
the number of its process.

Exit status: that of the job (`statuses.of_job`), 128 + n where a signal n ended it.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

import commands
import statuses
from repository import ROOT


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


def job_commands(
    processes: int, devices: int, arguments: Sequence[str], port: int
) -> list[list[str]]:
    """The command of each process.

    Args:
        processes: how many.
        devices: CPU devices of each; 0 for the machine's own.
        arguments: of bigbatch.main.
        port: of the first process, on which the others find it.
    """
    # This checkout's code, wherever the paths among the arguments begin; after it the user's own,
    # which Python would put first.
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")]), os.getcwd()]
    environment = ["PYTHONSAFEPATH=1", f"PYTHONPATH={os.pathsep.join(path)}"]
    if devices:
        flags = [os.environ.get("XLA_FLAGS", ""),
                 f"--xla_force_host_platform_device_count={devices}"]
        environment += ["JAX_PLATFORMS=cpu", f"XLA_FLAGS={' '.join(flags).strip()}"]
    return [
        ["env", *environment, sys.executable, "-u", "-m", "bigbatch.main", *arguments,
         f"--coordinator=127.0.0.1:{port}", f"--processes={processes}", f"--process={process}"]
        for process in range(processes)
    ]


def run_job(
    processes: int, devices: int, arguments: Sequence[str], options: argparse.Namespace
) -> int:
    """Runs the job, again where it asks for it, and returns its status.

    Args:
        processes, devices, arguments: see `job_commands`.
        options: port, restarts, dry_run.
    """
    if options.dry_run:
        for command in job_commands(processes, devices, arguments, options.port or free_port()):
            print(commands.line(command))
        return statuses.FINISHED
    for left in range(options.restarts, -1, -1):
        status, told = _run_once(
            job_commands(processes, devices, arguments, options.port or free_port())
        )
        if told or not left or not statuses.wants_restart(status):
            break
        print(f"launch: the job ended with {status}; started again, {left - 1} restarts left",
              flush=True)
    return status


def _run_once(job: Sequence[Sequence[str]]) -> tuple[int, bool]:
    """The job's status, and whether it was told to stop."""
    running: list[subprocess.Popen] = []
    told = 0

    def pass_on(number: int, frame: object) -> None:
        nonlocal told
        told += 1
        for process in running:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM if told == 1 else signal.SIGKILL)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for command in job:
            # A group of its own: Ctrl-C then comes from here only, and once.
            running.append(subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, text=True, errors="replace", process_group=0,
            ))
            if told:  # between two starts: the handler has not seen this one
                running[-1].send_signal(signal.SIGTERM)
        printers = [
            threading.Thread(target=_print, args=(index, process), daemon=True)
            for index, process in enumerate(running)
        ]
        for printer in printers:
            printer.start()
        while any(process.poll() is None for process in running):
            time.sleep(0.05)
        for printer in printers:
            printer.join(timeout=5)
    finally:
        for process in running:
            if process.poll() is None:
                process.kill()
        for number, handler in before.items():
            signal.signal(number, handler)
    ended = [process.returncode for process in running]
    return statuses.of_job(128 - code if code < 0 else code for code in ended), bool(told)


def _print(index: int, process: subprocess.Popen) -> None:
    for text in process.stdout:
        print(f"[{index}] {text.rstrip()}", flush=True)


def main(argv: list[str]) -> int:
    """The command line."""
    own, arguments = commands.split(argv)
    parser = commands.make_parser("local", __doc__)
    parser.add_argument("--processes", type=int, default=2, help="default 2")
    parser.add_argument("--devices-per-process", type=int, default=1, help="default 1")
    parser.add_argument("--port", type=int, default=0, help="of the first process; 0: a free one")
    parser.add_argument("--restarts", type=int, default=0,
                        help="how often to start again after 42 or a kill (default 0)")
    commands.add_flags(parser)
    options = commands.parse(parser, own)
    return run_job(options.processes, options.devices_per_process, arguments, options)


if __name__ == "__main__":
    commands.main(main)
