"""The scripts of launch/ with stand-ins for the programs that reach a cloud.

A stand-in writes its arguments to a log and answers from a list of rules. git is the real one,
behind a stand-in that only writes the log.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
BARE = (sys.executable, "-BESs")  # a Python that finds no installed package
# What launch/ may import of the package.
PLAIN = ("__init__.py", "job/__init__.py", "job/chips.py", "job/statuses.py")
CLOUDS = ("gcloud", "xpk", "sky", "docker", "kubectl")
NOT_FOUND = {"status": 1, "stderr": "ERROR: (gcloud) NOT_FOUND: Resource 'slice' was not found\n"}
NASTY = (
    "--config=configs/x.py:increase,recipe.falls=((0.7,2),(1.4,2))",
    "--workdir=gs://bucket/run",
    """--config.data.name=it's "5%" of $HOME, `date` $(date) \\ * ; & | $$ #1""",
)
_STAND_IN = """#!{python} -IS
import json, os, sys
folder = {folder!r}
call = [os.path.basename(sys.argv[0]), *sys.argv[1:]]
text = "\\n".join(call)
for number, rule in enumerate(json.load(open(folder + "/rules.json"))):
    if all(word in text for word in rule["words"]):
        counted = f"{{folder}}/rule{{number}}"
        with open(counted, "a+") as file:
            file.write(".")
            file.seek(0)
            answer = rule["answers"][min(len(file.read()), len(rule["answers"])) - 1]
        break
else:
    answer = {{}}
with open(folder + "/calls.jsonl", "a") as log:
    log.write(json.dumps(call) + "\\n")
sys.stdin.read()
sys.stdout.write(answer.get("stdout", ""))
sys.stderr.write(answer.get("stderr", ""))
sys.exit(answer.get("status", 0))
"""


@dataclass
class Laptop:
    """A checkout with launch/ and what it needs of the package, and the programs that it finds."""

    folder: Path
    root: Path = field(init=False)

    def __post_init__(self):
        self.root = self.folder / "checkout"
        self.bin = self.folder / "bin"
        for folder in (self.root, self.bin, self.folder / "tmp", self.folder / "rules"):
            folder.mkdir(parents=True)
        shutil.copytree(REPOSITORY / "launch", self.root / "launch",
                        ignore=shutil.ignore_patterns("__pycache__"))
        (self.root / "bigbatch/job").mkdir(parents=True)
        for name in PLAIN:
            shutil.copy(REPOSITORY / "bigbatch" / name, self.root / "bigbatch" / name)
        (self.root / ".gitignore").write_text("__pycache__/\n")
        (self.root / "committed.txt").write_text("committed\n")
        for words in (["init", "--quiet"], ["add", "."],
                      ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "a"]):
            subprocess.run(["git", *words], cwd=self.root, check=True)
        for name in CLOUDS:
            self.program(name, _STAND_IN.format(python=sys.executable, folder=str(self.folder)))
        self.program("git", f"""#!/bin/bash
{{ printf '["git"'; printf ', "%s"' "$@"; echo ']'; }} >> {self.folder}/calls.jsonl
exec {shutil.which("git")} "$@"
""")
        self.rules([])

    def program(self, name: str, text: str) -> None:
        """Puts a program on the scripts' PATH."""
        path = self.bin / name
        path.write_text(text)
        path.chmod(0o755)

    def rules(self, rules: list[tuple[tuple[str, ...], list[dict]]]) -> None:
        """How the stand-ins answer from now on.

        A call gets the next answer of the first rule whose words are all in it; the last answer
        is repeated. Calls so far are forgotten.
        """
        for path in self.folder.glob("rule[0-9]*"):
            path.unlink()
        (self.folder / "calls.jsonl").unlink(missing_ok=True)
        (self.folder / "rules.json").write_text(
            json.dumps([{"words": words, "answers": answers} for words, answers in rules]))

    def environment(self) -> dict[str, str]:
        return os.environ | {
            "PATH": f"{self.bin}:/usr/bin:/bin", "TMPDIR": str(self.folder / "tmp"),
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    def launch(self, script: str, *arguments: str, status: int = 0) -> subprocess.CompletedProcess:
        """Runs a script to its end; fails unless it ends with `status`."""
        done = subprocess.run(
            [*BARE, f"launch/{script}.py", *arguments], cwd=self.root, text=True,
            capture_output=True, env=self.environment(), timeout=60,
        )
        assert done.returncode == status, f"{done.returncode}:\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr, done.stderr
        return done

    def calls(self) -> list[list[str]]:
        """What the stand-ins were called with, in order."""
        path = self.folder / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def outline(calls: list[list[str]]) -> list[str]:
    """The calls in short: "create", "ssh start", ..., without looking at states."""
    short = []
    for call in calls:
        text = " ".join(call)
        if call[0] == "git" or " describe " in text:
            continue
        if " ssh " in text:
            kinds = {"tar -xzf": "install", "systemd-run": "start", "systemctl show": "status",
                     "journalctl": "logs", "systemctl stop": "stop"}
            short.append("ssh " + next(kind for part, kind in kinds.items() if part in text))
        else:
            short.append(call[3 + (call[3] in ("queued-resources", "tpu-vm"))])
    return short


def workers(text: str, hosts: int = 2) -> dict:
    """The answer of `gcloud ... ssh --worker=all` where every worker says so."""
    return {"stdout": "".join(f"bigbatch: w-{host} {text}\n" for host in range(hosts)),
            "stderr": "SSH: Attempting to connect to worker 0...\n"}


def units(*states: str) -> dict:
    """The answers to the question for the units: "runs", "lost", "unseen", "killed 9", a status."""
    shown = []
    for host, now in enumerate(states):
        kind, _, number = now.rpartition(" ")
        if now == "runs":
            values = "loaded active running 0 0"
        elif now == "lost":
            values = "not-found inactive dead 0 0"
        elif now == "unseen":
            values = "loaded inactive dead 0 0"
        elif kind == "killed":
            values = f"loaded failed failed 2 {number}"
        elif now == "0":
            values = "loaded active exited 1 0"
        else:
            values = f"loaded failed failed 1 {now}"
        names = ("LoadState", "ActiveState", "SubState", "ExecMainCode", "ExecMainStatus")
        pairs = " ".join(map("=".join, zip(names, values.split(), strict=True)))
        shown.append(f"bigbatch: w-{host} {pairs}\n")
    return {"stdout": "".join(shown)}


def cloud(
    states: list[str], jobs: list[dict] | None = None, first: list | None = None, hosts: int = 2
) -> list:
    """Rules for gcloud: a queued resource with these states, one a look ("" where there is none),
    and a job whose units are asked for.

    Args:
        states: of the queued resource; the last one stays.
        jobs: answers to the question for the units, see `units`.
        first: rules that come before the others.
        hosts: how many workers the slice has.
    """
    answers = [{"stdout": f"{state}\n"} if state else NOT_FOUND for state in states]
    described = {"stdout": json.dumps({"networkEndpoints": [{}] * hosts})}
    return [
        *(first or []),
        (("queued-resources", "describe"), answers),
        (("tpu-vm", "describe"), [described]),
        (("ssh", "tar -xzf"), [workers("installed", hosts)]),
        (("ssh", "systemd-run"), [workers("started", hosts)]),
        (("ssh", "systemctl show"), jobs or [units(*["0"] * hosts)]),
        (("ssh", "systemctl stop"), [workers("stopped", hosts)]),
    ]
