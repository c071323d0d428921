"""launch/gke.py, sky.py and thirty_minutes.py against stand-ins for the programs they call."""

import json
import shlex
import subprocess
import sys

import pytest
import yaml

from tests.support.launch_standins import NASTY, cloud, outline, units

JOB = ("--", *NASTY)
ENVIRONMENT = "BIGBATCH_TEST=it's $HOME"
SLICE = ("--tpu-type=v5litepod-256", "--spot")
CLUSTER = ("--cluster=c", "--zone=z", "--retry-seconds=0")


def recorded(script, folder):
    """The arguments with which a line of bash calls `python` or the job's own Python."""
    home, binaries = folder / "home", folder / "bin"
    for python in (binaries / "python", home / "bigbatch-venv/bin/python"):
        python.parent.mkdir(parents=True, exist_ok=True)
        python.write_text(f"""#!{sys.executable} -IS
import json, os, sys
print(json.dumps([sys.argv[1:], os.getppid(), os.environ.get("BIGBATCH_TEST")]))
sys.exit(42)
""")
        python.chmod(0o755)
    (home / "bigbatch").mkdir(exist_ok=True)
    process = subprocess.Popen(
        ["bash", "-c", script], text=True, stdout=subprocess.PIPE,
        env={"HOME": str(home), "PATH": f"{binaries}:/usr/bin:/bin"})
    output, _ = process.communicate(timeout=60)
    return json.loads(output), process


@pytest.mark.parametrize("script, arguments, called", [
    ("gke", ("cluster", "c", "--zone=z", *SLICE), ["xpk cluster create"]),
    ("gke", ("image", "registry/bigbatch:1"), ["docker build", "docker push"]),
    ("gke", ("create", "n", *CLUSTER, *SLICE, "--image=i", *JOB), ["xpk workload create"]),
    ("gke", ("logs", "n"), ["kubectl logs"]),
    ("gke", ("apply", "n", *SLICE, "--image=i", *JOB), ["kubectl create"]),
    ("sky", ("launch", "n", "--accelerator-type=v2-256", "--spot", *JOB), ["sky jobs launch"]),
    ("thirty_minutes", ("n", "--zone=z", "--workdir=gs://b/run", "--data=gs://b/tfds"), None),
])
def test_a_dry_run_prints_what_a_run_does_and_does_nothing(laptop, script, arguments, called):
    def gcloud():
        return cloud(["", "ACTIVE", "ACTIVE", "", "ACTIVE"], [units("3", "3"), units("0", "0")])

    laptop.rules(gcloud())
    printed = laptop.launch(script, "--dry-run", *arguments).stdout if called is None else (
        laptop.launch(script, arguments[0], "--dry-run", *arguments[1:]).stdout)
    assert laptop.calls() == [], "a dry run called something"
    laptop.rules(gcloud())
    laptop.launch(script, *arguments)
    done = [shlex.join(call) for call in laptop.calls()]
    assert [line.partition(" < ")[0] for line in printed.splitlines()] == done
    if called is not None:
        done = [line for line in done if not line.startswith("git ")]
        assert len(done) == len(called), "and nothing else is made or deleted"
        assert all(map(str.startswith, done, called)), done


def test_the_jobs_arguments_arrive_unharmed_through_xpk(laptop, tmp_path):
    laptop.launch("gke", "create", "n", *CLUSTER, *SLICE, "--image=i", f"--env={ENVIRONMENT}", *JOB)
    call = laptop.calls()[-1]
    command = next(word for word in call if word.startswith("--command=")).partition("=")[2]
    assert "--max-restarts=100" in call and "--restart-on-exit-codes=42" in call
    assert "--spot" in call
    # As xpk wraps it, in a pod whose $$ Kubernetes has read as $.
    wrapped = f"({command}) & PID=$!; wait $PID; exit $?".replace("$$", "$")
    (arguments, parent, found), process = recorded(wrapped, tmp_path)
    assert arguments == ["-u", "-m", "bigbatch.main", *NASTY]
    assert f"BIGBATCH_TEST={found}" == ENVIRONMENT
    assert parent == process.pid, "a stop goes to what xpk started, which has to be Python itself"
    assert process.returncode == 42


def test_the_jobset_starts_all_hosts_again_but_for_failures_mistakes_and_stops(laptop):
    made = yaml.safe_load(
        laptop.launch("gke", "jobset", "n", *SLICE, "--image=registry/i:1", f"--env={ENVIRONMENT}",
                      *JOB).stdout)
    assert laptop.calls() == []
    assert (made["apiVersion"], made["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert made["spec"]["failurePolicy"] == {
        "maxRestarts": 100,
        "rules": [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}]}
    job = made["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["parallelism"] == job["completions"] == 64, "256 chips, 4 on each host"
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"] == {
        "containerName": "bigbatch", "operator": "In", "values": [1, 2, 3]}
    pod = job["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "16x16", "cloud.google.com/gke-spot": "true"}
    container = pod["containers"][0]
    command = [word.replace("$$", "$") for word in container["command"]]  # as Kubernetes reads it
    assert command == ["env", ENVIRONMENT, "python", "-u", "-m", "bigbatch.main", *NASTY]
    mounted = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert {"name": mounted["/dev/shm"], "emptyDir": {"medium": "Memory"}} in pod["volumes"], (
        "a container's own 64 MB are too little for the workers of ImageNet")
    assert container["ports"] == [{"containerPort": 8476}]
    assert container["image"] == "registry/i:1"


@pytest.mark.parametrize("flags, named", [
    (["--tpu-type=v2-256"], "launch/tpu_vm.py"), (["--tpu-type=v4-64"], "--topology"),
    (["--tpu-type=v4-64", "--topology=2x2x4"], "32 chips"),
])
def test_a_slice_that_gke_lacks_is_refused(laptop, flags, named):
    said = laptop.launch("gke", "apply", "n", "--image=i", *flags, *JOB, status=2).stderr
    assert named in said and laptop.calls() == []


def test_skypilot_gets_the_committed_tree_and_the_one_command(laptop, tmp_path):
    arguments = (
        "n", "--accelerator-type=v5litepod-16", "--spot", f"--env={ENVIRONMENT}", *JOB)
    laptop.launch("sky", "launch", *arguments)
    path = laptop.calls()[-1][3]
    made = yaml.safe_load(open(path))
    assert made == yaml.safe_load(laptop.launch("sky", "task", *arguments).stdout)
    resources = made["resources"]
    assert (resources["accelerators"], resources["use_spot"]) == ("tpu-v5litepod-16", True)
    assert resources["accelerator_args"] == {"runtime_version": "v2-alpha-tpuv5-lite"}
    assert resources["job_recovery"] == {"recover_on_exit_codes": [42]}
    (remote, packed), = made["file_mounts"].items()
    assert f"tar -xzf {remote} " in made["setup"]
    names = subprocess.run(["tar", "-tzf", packed], text=True, capture_output=True).stdout
    assert "committed.txt" in names.split()
    (job, _, found), process = recorded(made["run"], tmp_path)
    assert job == ["-u", "-m", "bigbatch.main", *NASTY]
    assert f"BIGBATCH_TEST={found}" == ENVIRONMENT
    assert process.returncode == 42, "the status that makes SkyPilot start it again"


THIRTY = ("n", "--zone=z", "--workdir=gs://b/run", "--retry-seconds=0", "--poll-seconds=0")


def test_thirty_minutes_deletes_its_first_slice_before_it_makes_the_second(laptop):
    laptop.rules(cloud(["", "ACTIVE", "ACTIVE", "", "ACTIVE"], [units("3", "3"), units("0", "0")]))
    laptop.launch("thirty_minutes", *THIRTY)
    one = ["create", "scp", "ssh install", "ssh start", "ssh status", "delete"]
    assert outline(laptop.calls()) == one + one
    text = [" ".join(call) for call in laptop.calls()]
    made = [line for line in text if " create " in line]
    assert "n-first" in made[0] and "v2-256" in made[0]
    assert "n-second" in made[1] and "v2-512" in made[1]
    first, second = (line for line in text if "systemd-run" in line)
    assert "--stop_after_phase=noise/1" in first and "stop_after_phase" not in second
    assert "--workdir=gs://b/run" in first and "--workdir=gs://b/run" in second


def test_thirty_minutes_keeps_its_slices_where_told(laptop):
    laptop.rules(cloud(["", "ACTIVE", "ACTIVE", "", "ACTIVE"], [units("3", "3"), units("0", "0")]))
    laptop.launch("thirty_minutes", *THIRTY, "--keep")
    assert "delete" not in outline(laptop.calls())


def test_thirty_minutes_stops_where_its_first_part_failed(laptop):
    laptop.rules(cloud(["", "ACTIVE"], [units("1", "1")]))
    said = laptop.launch("thirty_minutes", *THIRTY, status=1).stdout
    assert outline(laptop.calls())[-1] == "delete" and "second was not begun" in said
    assert not any("n-second" in word for call in laptop.calls() for word in call)


def test_a_broken_off_second_part_goes_on_where_its_slice_is_still_there(laptop):
    laptop.rules(cloud(["ACTIVE"], [units("runs", "runs"), units("0", "0")]))
    disk = "--data-disk=projects/p/zones/z/disks/d"
    arguments = (*THIRTY, disk, "--env=A=1", "--spot", "--skip-first", "--reuse")
    laptop.launch("thirty_minutes", *arguments)
    assert outline(laptop.calls()) == ["ssh status", "ssh start", "ssh status", "delete"]
    assert all("n-second" in call for call in laptop.calls() if call[0] == "gcloud")
    laptop.rules(cloud(["", "ACTIVE", "SUSPENDED", "SUSPENDED", "ACTIVE"], [units("0", "0")]))
    laptop.launch("thirty_minutes", *arguments)
    calls = [" ".join(call) for call in laptop.calls()]
    made = [text for text in calls if " create " in text]
    assert len(made) == 2 and made[0] == made[1], "made again as it was asked for the first time"
    assert "--spot" in made[0] and "source=projects/p/zones/z/disks/d,mode=read-only" in made[0]
    assert all("A=1" in text and "LABEL=bigbatch" in text
               for text in calls if "systemd-run" in text)
