"""SLURM for tests: stand-ins for its commands, and the real one where its programs are."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.support import started

NODES = 2
GPUS = 2  # of a node of the real one; nobody touches them

# One program for the three names. srun starts its processes as the real one does, on nodes that
# are all this machine.
_COMMANDS = """#!{python} -IS
import json, os, pathlib, signal, subprocess, sys, threading
folder = pathlib.Path({folder!r})
name, arguments = os.path.basename(sys.argv[0]), sys.argv[1:]
with open(folder / "calls.jsonl", "a") as log:
    log.write(json.dumps([name, *arguments]) + "\\n")

def sbatch():
    (folder / "script").write_text(pathlib.Path(arguments[-1]).read_text())
    print("7;cluster")

def scontrol():
    if arguments[0] == "show":
        print("JobId=7 JobName=n JobState=" + (folder / "state").read_text())
    else:
        assert arguments == ["requeue", "7"], arguments
        (folder / "requeued").touch()

def srun():
    flags = {{}}
    while arguments[0].startswith("--"):
        key, _, value = arguments.pop(0)[2:].partition("=")
        flags[key] = value
    each, count = int(flags["ntasks-per-node"]), int(flags["ntasks"])
    (folder / "flags.json").write_text(json.dumps(flags))
    told = []
    signal.signal(signal.SIGUSR1, lambda *_: told.append(1) or [
        task.send_signal(signal.SIGUSR1) for task in tasks])
    tasks = []
    for task in range(count):
        given = {{
            "SLURM_PROCID": str(task), "SLURM_LOCALID": str(task % each),
            "SLURM_NTASKS": str(count), "SLURM_NODEID": str(task // each),
            "SLURM_STEP_NODELIST": "127.0.0.[1-2]" if count > each else "127.0.0.1",
            "SLURM_STEP_NUM_NODES": str(count // each)}}
        tasks.append(subprocess.Popen(
            arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=os.environ | given))
    (folder / "tasks").write_text(" ".join(str(task.pid) for task in tasks))

    def show(number, task):
        for line in task.stdout:
            print(f"{{number}}: {{line}}", end="", flush=True)

    showing = [threading.Thread(target=show, args=pair) for pair in enumerate(tasks)]
    for thread in showing:
        thread.start()
    largest = 0
    for number, task in enumerate(tasks):
        showing[number].join()
        code = task.wait()
        how = f"Exited with exit code {{code}}" if code > 0 else signal.strsignal(-code or 9)
        how += " (core dumped)" if code == -6 else ""
        if code:
            print(f"srun: error: 127.0.0.{{number // each + 1}}: task {{number}}: {{how}}",
                  file=sys.stderr, flush=True)
        largest = max(largest, 128 - code if code < 0 else code)
    sys.exit(largest)

globals()[name]()
"""


class StandIn:
    """A cluster with one job, which is always number 7."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.bin = folder / "slurm-bin"
        self.bin.mkdir(parents=True)
        for name in ("sbatch", "srun", "scontrol"):
            path = self.bin / name
            path.write_text(_COMMANDS.format(python=sys.executable, folder=str(folder)))
            path.chmod(0o755)
        self.state("RUNNING")

    def environment(self) -> dict[str, str]:
        return {"PATH": f"{self.bin}:{os.environ['PATH']}"}

    def state(self, state: str, reason: str = "None") -> None:
        """What `scontrol show job` calls the job from now on."""
        (self.folder / "state").write_text(f"{state} Reason={reason}")

    def calls(self) -> list[list[str]]:
        """What the commands were called with, in order."""
        path = self.folder / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @contextlib.contextmanager
    def started(self, output: Path, restarts: int = 0, **environment: str) -> Iterator:
        """The job's script in a bash of its own, as on the first node; ended at the end."""
        (self.folder / "requeued").unlink(missing_ok=True)
        (self.folder / "tasks").unlink(missing_ok=True)
        given = os.environ | self.environment() | {"SLURM_JOB_ID": "7"} | environment
        given |= {"SLURM_RESTART_COUNT": str(restarts)} if restarts else {}
        with open(output, "a") as file:
            process = subprocess.Popen(
                ["bash", str(self.folder / "script")], cwd="/", env=given, stdout=file,
                stderr=subprocess.STDOUT)
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()

    def requeued(self) -> bool:
        """Whether the job that ended last went back into the queue."""
        return (self.folder / "requeued").exists()

    def warn(self, number: int = signal.SIGUSR1) -> None:
        """Sends a signal to the processes, and not to the script, as SLURM does."""
        for pid in (self.folder / "tasks").read_text().split():
            os.kill(int(pid), number)


class Real:
    """munged, slurmctld and a slurmd for each of two nodes, all on this machine."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._running: list[subprocess.Popen] = []

    def environment(self) -> dict[str, str]:
        return {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def start(self) -> str:
        """Starts all of it; returns what stands in the way, or ""."""
        missing = [name for name in ("munged", "slurmctld", "slurmd", "sbatch")
                   if not shutil.which(name)]
        if missing or os.getuid():
            return f"needs root, and {' and '.join(missing)} (Debian: slurm-wlm munge)"
        self._write_settings()
        for command in (
            ["munged", "--foreground", "--force", f"--socket={self.folder}/munge.socket",
             *(f"--{what}-file={self.folder}/munge.{what}"
               for what in ("key", "pid", "log", "seed"))],
            ["slurmctld", "-D", "-c"],
            *(["slurmd", "-D", "-N", f"127.0.0.{node + 1}"] for node in range(NODES)),
        ):
            with open(self.folder / "daemons.log", "a") as log:
                self._running.append(subprocess.Popen(
                    command, env=os.environ | self.environment(), stdout=log, stderr=log))
        with contextlib.suppress(TimeoutError):
            self.until(lambda: self.run("sinfo", "-h", "-o", "%T %D").split() == ["idle", "2"], 30)
            return ""
        self.stop()
        return f"the daemons do not come up: {(self.folder / 'daemons.log').read_text()[-500:]}"

    def _write_settings(self) -> None:
        host = socket.gethostname()
        (self.folder / "munge.key").write_bytes(os.urandom(128))
        (self.folder / "munge.key").chmod(0o600)
        (self.folder / "state").mkdir()
        ports = [started.free_port() for _ in range(NODES + 1)]
        # JAX takes the first node's name for its address, so the nodes are called by addresses. A
        # job that went back waits for cred_expire.
        nodes = "\n".join(
            f"NodeName=127.0.0.{node + 1} NodeHostname={host} NodeAddr=127.0.0.1 "
            f"Port={ports[node]} CPUs={os.cpu_count()} Gres=gpu:{GPUS}" for node in range(NODES))
        (self.folder / "gres.conf").write_text(f"Name=gpu File=/dev/tty[1-{GPUS}]\n")
        (self.folder / "slurm.conf").write_text(f"""
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[-1]}
SlurmUser=root
AuthInfo=socket={self.folder}/munge.socket,cred_expire=10
StateSaveLocation={self.folder}/state
SlurmdSpoolDir={self.folder}/spool.%n
SlurmctldPidFile={self.folder}/slurmctld.pid
SlurmdPidFile={self.folder}/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
{nodes}
PartitionName=main Nodes=ALL Default=YES
""")

    def stop(self) -> None:
        for process in reversed(self._running):
            process.terminate()
        for process in reversed(self._running):
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()

    def run(self, *command: str) -> str:
        """What a command of SLURM prints."""
        return subprocess.run(
            command, env=os.environ | self.environment(), text=True, capture_output=True,
            timeout=60).stdout

    def job(self, number: str) -> dict[str, str]:
        """What SLURM says of a job."""
        shown = self.run("scontrol", "show", "job", "--oneliner", number)
        return dict(text.partition("=")[::2] for text in shown.split())

    def until(self, ready: Callable[[], bool], seconds: float) -> None:
        """Waits; raises TimeoutError."""
        end = time.monotonic() + seconds
        while not ready():
            if time.monotonic() > end:
                raise TimeoutError
            time.sleep(0.2)
