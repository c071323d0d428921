"""launch/tpu_vm.py against a stand-in for gcloud: order, quoting, retries, cleaning up."""

import json
import shlex
import shutil
import subprocess
import sys

import pytest

from tests.support.launch_standins import NASTY, NOT_FOUND, cloud, outline, units, workers

WHERE = ("slice", "--zone=z", "--retry-seconds=0", "--poll-seconds=0")
RUN = ("run", *WHERE, "--accelerator-type=v2-256", "--spot")
UP = ["", "ACTIVE"]
BROUGHT_UP = ["create", "scp", "ssh install", "ssh start"]


def launch(laptop, *arguments, status=0, job=NASTY):
    return laptop.launch("tpu_vm", *arguments, "--", *job, status=status)


@pytest.mark.parametrize("arguments", [
    (*RUN, "--delete-at-end"), (*RUN, "--reuse"),
    ("create", *WHERE, "--accelerator-type=v6e-16", "--project=p"),
    ("install", *WHERE), ("start", *WHERE), ("status", *WHERE), ("logs", *WHERE),
    ("stop", *WHERE), ("delete", *WHERE),
])
def test_a_dry_run_prints_what_a_run_does_and_does_nothing(laptop, arguments):
    new = arguments[0] in ("run", "create") and "--reuse" not in arguments
    laptop.rules(cloud(UP if new else ["ACTIVE"]))
    printed = launch(laptop, *arguments, "--dry-run").stdout.splitlines()
    assert laptop.calls() == [], "a dry run called something"
    launch(laptop, *arguments)
    assert printed == [shlex.join(call) for call in laptop.calls()]
    asked = {"delete", "--delete-at-end"} & set(arguments)
    assert ("delete" in outline(laptop.calls())) == bool(asked)


def test_a_run_brings_up_installs_starts_and_watches(laptop):
    laptop.rules(cloud(["", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"],
                       [units("runs", "runs"), units("0", "runs"), units("0", "0")]))
    said = launch(laptop, *RUN).stdout
    assert outline(laptop.calls()) == [*BROUGHT_UP, *["ssh status"] * 3], "and deletes nothing"
    create = next(call for call in laptop.calls() if "create" in call)
    assert {"--spot", "--runtime-version=tpu-ubuntu2204-base", "--node-id=slice"} <= set(create)
    assert "128 chips" in said, "v2-256 counts cores, of which a chip has two"
    assert "to delete: gcloud compute tpus queued-resources delete slice" in said


@pytest.fixture
def worker(tmp_path):
    """Does on a worker, in a home of its own, what an ssh command says; returns the job's call."""
    binaries, home = tmp_path / "bin", tmp_path / "home"
    python = home / "bigbatch-venv/bin/python"
    for folder in (binaries, python.parent, home / "bigbatch"):
        folder.mkdir(parents=True)
    record = f"""#!{sys.executable} -IS
import json, os, sys
job = [sys.argv[1:], os.getcwd(), os.environ.get("BIGBATCH_TEST")]
json.dump(job, open({str(tmp_path / "job.json")!r}, "w"))
"""
    systemd_run = f"""#!{sys.executable} -IS
import os, sys
assert "--unit=bigbatch" in sys.argv
words = sys.argv[1:]
while words[0].startswith("--"):  # as systemd does: options, then a command in which $$ is $
    name, _, value = words.pop(0).partition("=")
    if name == "--working-directory":
        os.chdir(value)
words = [words[0]] + [word.replace("$$", "$") for word in words[1:]]
os.execvp(words[0], words)
"""
    systemctl = f"""#!/bin/bash
test "$1" = show || exit 0
case "$*" in *SubState*) cat {tmp_path}/substate ;; *) cat {tmp_path}/description ;; esac
"""
    for path, text in ((python, record), (binaries / "systemd-run", systemd_run),
                       (binaries / "systemctl", systemctl),
                       (binaries / "sudo", '#!/bin/bash\nexec "$@"\n')):
        path.write_text(text)
        path.chmod(0o755)

    def run(call, substate="dead", description=""):
        (tmp_path / "substate").write_text(substate)
        (tmp_path / "description").write_text(description)
        (tmp_path / "job.json").unlink(missing_ok=True)
        script = next(word for word in call if word.startswith("--command=")).partition("=")[2]
        done = subprocess.run(
            ["bash", "-c", script], text=True, capture_output=True, timeout=60,
            env={"HOME": str(home), "PATH": f"{binaries}:/usr/bin:/bin"},
        )
        job = tmp_path / "job.json"
        return done, json.loads(job.read_text()) if job.exists() else None

    run.home, run.binaries = home, binaries
    return run


def test_the_jobs_arguments_arrive_unharmed_behind_ssh_and_systemd(laptop, worker):
    laptop.rules(cloud(["ACTIVE"]))
    launch(laptop, "start", *WHERE)
    start = laptop.calls()[-1]
    done, job = worker(start)
    assert job == [["-u", "-m", "bigbatch.main", *NASTY], str(worker.home / "bigbatch"), None]
    assert done.stdout.startswith("bigbatch: started on ")
    launch(laptop, "start", *WHERE, "--env=BIGBATCH_TEST=it's $HOME")
    assert worker(laptop.calls()[-1])[1] == [*job[:2], "it's $HOME"]
    assert "no-value" in launch(laptop, "start", *WHERE, "--env=no-value", status=2).stderr


def test_a_data_disk_is_mounted_before_the_job_starts_and_once(laptop, worker):
    laptop.rules(cloud(["ACTIVE"]))
    launch(laptop, "start", *WHERE, "--data-disk=projects/p/zones/z/disks/d")
    log = worker.home / "mounts"
    for name, status in (("mkdir", 0), ("mountpoint", 1), ("mount", 0)):
        path = worker.binaries / name
        path.write_text(f'#!/bin/bash\necho {name} "$@" >> {log}\nexit {status}\n')
        path.chmod(0o755)
    assert worker(laptop.calls()[-1])[1], "the job was not started"
    assert log.read_text().splitlines() == [
        "mkdir -p /mnt/bigbatch", "mountpoint -q /mnt/bigbatch",
        "mount -o ro,noload LABEL=bigbatch /mnt/bigbatch"]
    (worker.binaries / "mount").write_text("#!/bin/bash\nexit 32\n")
    done, job = worker(laptop.calls()[-1])
    assert job is None and "bigbatch:" not in done.stdout, "started without its data"


def test_a_start_that_is_repeated_starts_nothing_twice(laptop, worker):
    laptop.rules(cloud(["ACTIVE"]))
    launch(laptop, "start", *WHERE)
    start = laptop.calls()[-1]
    digest = start[7].split("--description=")[1].split()[0]
    done, job = worker(start, substate="running", description=digest)
    assert job is None and done.stdout.startswith("bigbatch: started on ")
    done, job = worker(start, substate="running", description="another")
    assert job is None and done.returncode == 1 and "a job runs on" in done.stderr
    assert "bigbatch:" not in done.stdout
    assert worker(start, substate="failed", description=digest)[1], "one that ended starts again"


def test_the_committed_tree_is_what_arrives(laptop, worker):
    (laptop.root / "committed.txt").write_text("changed\n")
    laptop.rules(cloud(UP))
    try:
        refused = launch(laptop, *RUN, status=2).stderr
        assert "committed.txt" in refused and "--committed-only" in refused
        assert outline(laptop.calls()) == [], "nothing is made for code that is not ready to go"
        launch(laptop, "install", *WHERE, "--committed-only")
    finally:
        (laptop.root / "committed.txt").write_text("committed\n")
    scp, install = [call for call in laptop.calls() if "scp" in call or "ssh" in call]
    shutil.copy(scp[5], worker.home)
    assert scp[6] == "slice:"
    (worker.home / "bigbatch/stale.txt").touch()
    python = worker.binaries / "python3"
    python.write_text(f'#!/bin/bash\necho "$@" >> {worker.home}/uv\n')
    python.chmod(0o755)
    done, _ = worker(install)
    assert done.stdout.startswith("bigbatch: installed on "), done.stderr
    code = worker.home / "bigbatch"
    assert (code / "committed.txt").read_text() == "committed\n"
    assert (code / "launch/tpu_vm.py").exists() and not (code / "stale.txt").exists()
    assert f"-r {code}/requirements-tpu.txt" in (worker.home / "uv").read_text()


def test_what_may_be_repeated_is_repeated(laptop):
    broken = {"status": 255, "stderr": "Connection refused\n"}
    laptop.rules(cloud(UP, first=[
        (("scp",), [broken, broken, {}]),
        (("ssh", "tar -xzf"), [workers("installed", hosts=1), workers("installed")]),
        (("ssh", "systemd-run"), [broken, workers("started")]),
    ]))
    said = launch(laptop, *RUN).stderr
    assert outline(laptop.calls()) == [
        "create", *["scp"] * 3, *["ssh install"] * 2, *["ssh start"] * 2, "ssh status"]
    assert "1 of 2 workers answered" in said


def test_an_error_is_one_line_with_command_status_and_reason(laptop):
    laptop.rules(cloud(["ACTIVE"], first=[
        (("scp",), [{"status": 7, "stderr": "first words\nNo space left on device\n\n"}])]))
    lines = launch(laptop, "install", *WHERE, status=1).stderr.splitlines()
    assert lines[-1].startswith("launch: status 7 from `gcloud compute tpus tpu-vm scp ")
    assert lines[-1].endswith("`: No space left on device")
    assert outline(laptop.calls()) == ["scp"] * 5


def test_without_gcloud_one_line_says_so(laptop):
    gcloud = laptop.bin / "gcloud"
    text = gcloud.read_text()
    gcloud.unlink()
    try:
        path = laptop.environment() | {"PATH": str(laptop.bin)}
        done = subprocess.run([sys.executable, "launch/tpu_vm.py", "delete", *WHERE],
                              cwd=laptop.root, env=path, text=True, capture_output=True)
    finally:
        laptop.program("gcloud", text)
    assert done.returncode == 1
    assert done.stderr.endswith("gcloud is not installed, or not on the PATH\n")


@pytest.mark.parametrize("states, create, deleted", [
    (["", "FAILED"], {}, True),
    (["", "WAITING_FOR_RESOURCES", "SUSPENDING"], {}, True),
    (["", "PROVISIONING"], {"status": 1, "stderr": "deadline\n"}, True),
    (["", ""], {"status": 1, "stderr": "quota exceeded\n"}, False),
    (["", "ACTIVE"], {"status": 1, "stderr": "ALREADY_EXISTS: by another's hand\n"}, False),
])
def test_a_slice_that_does_not_come_up_leaves_nothing_behind(laptop, states, create, deleted):
    laptop.rules(cloud(states, first=[(("queued-resources", "create"), [create])]))
    said = launch(laptop, *RUN, status=1).stderr.splitlines()[-1]
    assert outline(laptop.calls()) == ["create"] + ["delete"] * deleted
    assert create.get("stderr", states[-1]).strip() in said


def test_waiting_has_a_limit_that_google_is_told_too(laptop):
    laptop.rules(cloud(["", "WAITING_FOR_RESOURCES"]))
    said = launch(laptop, *RUN, "--wait-minutes=0", status=1).stderr
    assert "WAITING_FOR_RESOURCES after 0 minutes" in said
    assert outline(laptop.calls()) == ["create", "delete"]
    assert any("--valid-until-duration=0s" in call for call in laptop.calls())


def test_a_slice_of_that_name_is_refused_or_taken_as_it_is(laptop):
    laptop.rules(cloud(["ACTIVE"]))
    said = launch(laptop, *RUN, status=2).stderr
    assert "exists already and is ACTIVE" in said and "--reuse" in said
    assert outline(laptop.calls()) == []
    launch(laptop, *RUN, "--reuse")
    whole = ["ssh status", "scp", "ssh install", "ssh start", "ssh status"]
    assert outline(laptop.calls()) == whole
    laptop.rules(cloud(["ACTIVE"]))
    launch(laptop, *RUN, "--reuse", "--delete-at-end")
    assert outline(laptop.calls()) == [*whole, "delete"], "asked for, after work well done"


def test_a_run_is_taken_up_again_without_touching_the_code_below_it(laptop, worker):
    laptop.rules(cloud(["ACTIVE"], [units("runs", "0"), units("0", "0")]))
    launch(laptop, *RUN, "--reuse")
    assert outline(laptop.calls()) == ["ssh status", "ssh start", "ssh status"]
    launch(laptop, "install", *WHERE)
    done, _ = worker(laptop.calls()[-1], substate="running")
    assert done.returncode == 1 and "stop it first" in done.stderr
    assert (worker.home / "bigbatch").exists(), "the running job's code is gone"


SILENT = {"status": 255, "stderr": "Connection timed out\n"}


def test_a_slice_taken_away_is_made_again(laptop):
    """While it is watched, after its workers fell silent, and while it is filled."""
    laptop.rules(cloud(
        ["", "ACTIVE", "ACTIVE", "SUSPENDED", "SUSPENDED", "ACTIVE", "ACTIVE", "SUSPENDING",
         "SUSPENDING", "ACTIVE", "SUSPENDED", "ACTIVE"],
        [units("runs", "runs"), SILENT, units("0", "0")],
        first=[(("tar -xzf",), [workers("installed")] * 2 + [SILENT] * 5 + [workers("i")])]))
    launch(laptop, *RUN, "--delete-at-end")
    assert outline(laptop.calls()) == [
        *BROUGHT_UP, "ssh status", "delete",
        *BROUGHT_UP, "ssh status", "delete",
        "create", "scp", *["ssh install"] * 5, "delete",
        *BROUGHT_UP, "ssh status", "delete"]


def test_workers_may_be_silent_for_a_while_but_not_for_good(laptop):
    laptop.rules(cloud(UP, [SILENT] * 9 + [units("0", "0")]))
    launch(laptop, *RUN)
    laptop.rules(cloud(UP, [SILENT]))
    said = launch(laptop, *RUN, "--delete-at-end", status=1)
    assert outline(laptop.calls()) == [*BROUGHT_UP, *["ssh status"] * 10], "the job may well go on"
    assert "to delete: " in said.stdout and said.stderr.endswith(": Connection timed out\n")


def test_a_cloud_out_of_reach_for_a_while_is_waited_for_and_then_its_cost_is_named(laptop):
    active, cut = {"stdout": "ACTIVE\n"}, {"status": 1, "stderr": "Name resolution failed\n"}
    laptop.rules(cloud(UP, first=[
        (("queued-resources", "describe"), [NOT_FOUND, active, *[cut] * 10, active])]))
    launch(laptop, *RUN)
    assert outline(laptop.calls()) == [*BROUGHT_UP, "ssh status"]
    laptop.rules(cloud(UP, first=[
        (("queued-resources", "describe"), [NOT_FOUND, active, cut]), (("delete",), [cut])]))
    said = launch(laptop, *RUN, "--delete-at-end=any", status=1)
    assert "costs what it costs; to delete: " in said.stdout
    assert said.stderr.endswith(": Name resolution failed\n")


def test_a_slice_that_another_made_is_never_deleted(laptop):
    laptop.rules(cloud(["ACTIVE", "ACTIVE", "SUSPENDED"], [units("1", "1")]))
    said = launch(laptop, *RUN, "--reuse", status=1)
    assert "slice is SUSPENDED" in said.stderr
    assert "delete" not in outline(laptop.calls()) and "create" not in outline(laptop.calls())


@pytest.mark.parametrize("ended", [("42", "42"), ("killed 9", "1"), ("lost", "killed 6"),
                                   ("killed 15", "42"), ("unseen", "42")])
def test_a_job_that_wants_it_is_started_again_on_the_same_slice(laptop, ended):
    laptop.rules(cloud(UP, [units(*ended), units("0", "0")]))
    launch(laptop, *RUN)
    assert outline(laptop.calls()) == [*BROUGHT_UP, "ssh status", "ssh start", "ssh status"]


def test_restarts_have_a_limit(laptop):
    laptop.rules(cloud(UP, [units("42", "42")]))
    launch(laptop, *RUN, "--restarts=2", status=42)
    assert outline(laptop.calls()).count("ssh start") == 3


@pytest.mark.parametrize("ended, status, deleted", [
    (("3", "3"), 3, True), (("1", "1"), 1, False), (("2", "2"), 2, False),
    (("1", "killed 6"), 1, False), (("42", "1"), 1, False), (("203", "203"), 1, False),
])
def test_a_job_that_ended_ends_the_run_with_its_status(laptop, ended, status, deleted):
    laptop.rules(cloud(UP, [units(*ended)]))
    launch(laptop, *RUN, "--delete-at-end", status=status)
    last = ["delete"] if deleted else ["ssh logs"]
    assert outline(laptop.calls()) == [*BROUGHT_UP, "ssh status", *last]


def test_delete_at_end_any_deletes_after_a_failure_and_after_an_install_that_failed(laptop):
    laptop.rules(cloud(UP, [units("1", "1")]))
    launch(laptop, *RUN, "--delete-at-end=any", status=1)
    assert outline(laptop.calls())[-2:] == ["ssh logs", "delete"]
    laptop.rules(cloud(UP, first=[(("tar -xzf",), [{"status": 1}])]))
    launch(laptop, *RUN, "--delete-at-end=any", status=1)
    assert outline(laptop.calls())[-2:] == ["ssh install", "delete"]


def test_deleting_is_repeated_until_it_is_done(laptop):
    laptop.rules([(("delete",), [{"status": 1, "stderr": "try again\n"}, NOT_FOUND])])
    launch(laptop, "delete", *WHERE)
    assert [call[4:6] for call in laptop.calls()] == [["delete", "slice"]] * 2


@pytest.mark.parametrize("job, named", [
    (("--workdir=gs://b/run",), "--config"), (("--config=c.py",), "--workdir"),
    (("--config=c.py", "--workdir=run"), "gs://BUCKET/RUN"),
    (("--config=c.py", "--workdir=/a", "-workdir=/b"), "--workdir=/a -workdir=/b: a job has one"),
    (("--config=c.py", "--workdir=gs://b/run", "--x=a\nb"), "line break"),
])
def test_a_job_that_cannot_work_is_refused_before_anything_is_made(laptop, job, named):
    said = launch(laptop, *RUN, status=2, job=job).stderr
    assert named in said and len(said.splitlines()) == 1
    assert laptop.calls() == []


def test_an_unknown_slice_is_refused_before_anything_is_made(laptop):
    said = launch(laptop, "run", *WHERE, "--accelerator-type=v2-255", status=2).stderr
    assert "'v2-255'" in said and laptop.calls() == []
    said = launch(laptop, "run", *WHERE, "--accelerator-type=a100-8", status=2).stderr
    assert "v5litepod" in said and laptop.calls() == []


@pytest.mark.parametrize("flag", ["--restarts=-1", "--poll-seconds=-1", "--poll-seconds=nan",
                                  "--retry-seconds=inf", "--wait-minutes=-1"])
def test_a_number_that_cannot_be_is_refused_before_anything_is_made(laptop, flag):
    laptop.rules(cloud(UP))
    said = launch(laptop, *RUN, flag, status=2).stderr
    assert said == f"launch: {flag}: a finite number is needed, 0 or more.\n"
    thirty = ("n", "--zone=z", "--workdir=gs://b/run", "--committed-only")
    assert laptop.launch("thirty_minutes", *thirty, flag, status=2).stderr == said
    assert outline(laptop.calls()) == []


def test_an_error_that_nobody_expected_names_the_slice_that_stands(laptop):
    laptop.rules(cloud(UP))
    text = (laptop.bin / "gcloud").read_text()
    ends = "sys.exit(answer"  # having started the job, it takes the launcher's temporary files away
    laptop.program("gcloud", text.replace(
        ends, f"""if "systemd-run" in text:
    import shutil
    shutil.rmtree(os.environ["TMPDIR"])
{ends}"""))
    try:
        done = subprocess.run(
            [sys.executable, "launch/tpu_vm.py", *RUN, "--", *NASTY], cwd=laptop.root, text=True,
            env=laptop.environment(), capture_output=True, timeout=60)
    finally:
        laptop.program("gcloud", text)
        (laptop.folder / "tmp").mkdir(exist_ok=True)
    assert outline(laptop.calls()) == BROUGHT_UP and "FileNotFoundError" in done.stderr
    assert "slice is left as it is and costs what it costs; to delete: " in done.stderr


def test_status_says_how_each_worker_is(laptop):
    laptop.rules(cloud(["ACTIVE"], [units("runs", "killed 9")]))
    said = launch(laptop, "status", *WHERE).stdout.splitlines()
    assert said == ["slice: ACTIVE", "w-0: runs", "w-1: ended with 137"]
    laptop.rules(cloud(["ACTIVE"], [units("42", "lost")]))
    said = launch(laptop, "status", *WHERE).stdout.splitlines()
    assert said[1:] == ["w-0: ended with 42", "w-1: has no job"]
    laptop.rules(cloud([""]))
    assert launch(laptop, "status", *WHERE).stdout == "slice: not there\n"
