"""What is prepared for a machine with a GPU: the parts of it that need no such machine.

`experiments/gpu/rehearse.sh` goes through all of it on a CPU, in about 12 minutes.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bigbatch.storage.logs import read_events
from tests.support import made_up_runs

REPOSITORY = Path(__file__).parents[2]
KIT = REPOSITORY / "experiments/gpu"


def call(program, *arguments, work, out, folder=REPOSITORY):
    ended = subprocess.run(
        [sys.executable, str(KIT / program), *arguments], cwd=folder, capture_output=True,
        text=True, env=os.environ | {"WORK": str(work), "OUT": str(out),
                                     "PYTHONPATH": str(REPOSITORY)})
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.fixture
def work(tmp_path):
    """One run that is over, one under way with a checkpoint of 20 MiB, and compiled programs."""
    work = tmp_path / "work"
    over = made_up_runs.write_run(work / "runs/over", [0.5, 0.6], [2.0, 1.0])
    under_way = made_up_runs.write_run(work / "runs/under_way", [0.5, 0.6], [2.0, 1.0])
    with (under_way / "metrics.jsonl").open("r+") as log:
        log.truncate(len(log.readline()))
    for run in (over, under_way):
        state = run / "checkpoints/000000000000010/state"
        state.mkdir(parents=True)
        (state / "arrays").write_bytes(os.urandom(20 * 2**20))
        made_up_runs.write_events(run / "timing.jsonl", [
            {"event": "speed", "examples_seen": 10 * number, "updates": 10,
             "updates_per_second": 4.0, "examples_per_second": 40.0,
             "model_flop_utilisation": 0.25} for number in (1, 2)])
    (work / "cache").mkdir()
    (work / "cache/program").write_bytes(b"compiled")
    (work / "trainings.json").write_text(json.dumps([{"revision": "unknown"}]))
    return work


def test_what_is_not_over_goes_on_elsewhere(work, tmp_path):
    here, there, out = tmp_path / "here", tmp_path / "there", tmp_path / "out"
    (here / ".gpu").mkdir(parents=True)
    out.mkdir()
    (here / ".gpu/revision").write_text("abc\n")
    told = call("packing.py", "pack", work=work, out=out, folder=here)
    assert "to be continued, state0.tar: under_way from example 10" in told
    assert {path.name for path in out.iterdir()} == {
        "logs.tar.xz", "state0.tar.0", "state0.tar.1", "cache.tar.gz"}
    assert max(path.stat().st_size for path in out.iterdir()) < 16 * 2**20

    (there / ".gpu/resume").mkdir(parents=True)
    for path in out.iterdir():
        path.rename(there / ".gpu/resume" / path.name)
    (there / "cifar10").mkdir()
    subprocess.run(["tar", "-cJf", ".gpu/cifar10.tar.xz", "cifar10"], cwd=there, check=True)
    new = tmp_path / "new"
    new.mkdir()
    call("packing.py", "unpack", work=new, out=out, folder=there)
    assert json.loads((new / "trainings.json").read_text())[0]["revision"] == "abc"
    assert (new / "cache/program").read_bytes() == b"compiled"
    kept = Path("runs/under_way/checkpoints/000000000000010/state/arrays")
    assert (new / kept).read_bytes() == (work / kept).read_bytes()
    for name in ("over", "under_way"):
        assert read_events(new / "runs" / name / "metrics.jsonl") == read_events(
            work / "runs" / name / "metrics.jsonl")
    assert not (new / "runs/over/checkpoints").exists() and (new / "data/cifar10").is_dir()


def test_speeds_are_read_off_the_logs(work, tmp_path):
    told = call("speeds.py", work=work, out=tmp_path)
    assert "over: epoch 0.4, update 2, training loss 1.0000, test accuracy 0.6000" in told
    assert "batch 10: 250.000 ms an update, 40 images a second, share of the peak 0.25" in told


def test_the_packages_here_are_whole(tmp_path):
    assert call("packages.py", work=tmp_path, out=tmp_path).endswith("all there\n")


@pytest.mark.parametrize("script", sorted(path.name for path in KIT.glob("*.sh")))
def test_a_script_is_a_shells(script):
    assert subprocess.run(["bash", "-n", KIT / script]).returncode == 0
