"""A job whose hosts have addresses of their own, and one that is cut off while it trains."""

import contextlib
import os
import subprocess
import time

import pytest

from bigbatch.storage import checkpoint
from bigbatch.storage.logs import read_events
from tests.support import started

DEAD_PEER_SECONDS = 10
ADDRESSES = ("10.213.77.1", "10.213.77.2")
# 300 updates; cut off after the second of ten checkpoints.
SETTINGS = ("recipe.epochs=120", "recipe.falls=((60,2),)", "log_every_epochs=5",
            "eval_every_epochs=20", "checkpoint_every_epochs=12")


def ip(*arguments):
    subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True)


@pytest.fixture
def hosts():
    """Two network namespaces on one bridge, by name; so is each one's cable to the bridge."""
    if os.geteuid() != 0:
        pytest.skip("needs network namespaces, which only root may make")
    tag = f"bb{os.getpid()}"
    bridge, names = f"{tag}b", [f"{tag}h{number}" for number in range(len(ADDRESSES))]
    with contextlib.ExitStack() as at_end:
        try:
            ip("link", "add", bridge, "up", "type", "bridge")
            at_end.callback(ip, "link", "delete", bridge)
            for name, address in zip(names, ADDRESSES, strict=True):
                ip("netns", "add", name)
                at_end.callback(ip, "netns", "delete", name)
                ip("link", "add", name, "up", "master", bridge, "type", "veth",
                   "peer", "eth0", "netns", name)
                ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
                for device in ("eth0", "lo"):
                    ip("-n", name, "link", "set", device, "up")
        except FileNotFoundError:
            pytest.skip("needs network namespaces, which the program ip (iproute2) makes")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"needs network namespaces: {error.cmd} says {error.stderr.strip()!r}")
        yield names


def run_on(name, address):
    """The command that runs another on a host.

    It has a name by which the other host can reach it, as gloo asks: here its address.
    """
    return ("ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c",
            f'echo {address} > /proc/sys/kernel/hostname && exec "$@"', "sh")


def start_job(workdir, hosts):
    return [
        started.start(
            workdir, *SETTINGS, **started.SMALL, process=(number, len(hosts)),
            host=ADDRESSES[0], port=8476, on=run_on(name, address),
            flags=(f"--dead_peer_seconds={DEAD_PEER_SECONDS}",),
        )
        for number, (name, address) in enumerate(zip(hosts, ADDRESSES, strict=True))
    ]


@pytest.mark.slow  # a dead process ends a job in test_many_processes.py
def test_a_host_that_is_cut_off_ends_the_job_and_with_the_cable_back_it_loses_no_bit(
    hosts, tmp_path
):
    job = start_job(tmp_path / "cut", hosts)
    try:
        started.wait_until(
            lambda: len(checkpoint.finished(tmp_path / "cut")) >= 2, job[0], "two checkpoints")
        ip("link", "set", hosts[1], "down")
        began = time.monotonic()
        for process in job:
            output, _ = process.communicate(timeout=6 * DEAD_PEER_SECONDS)
            assert process.returncode in (42, -6), output  # ours; JAX's own
            # Ours where an update fails first, else JAX's own.
            assert "another process of the job" in output or "another task died" in output, output
        assert time.monotonic() - began < 3 * DEAD_PEER_SECONDS
    finally:
        for process in job:
            process.kill()
    seen = checkpoint.find_newest(tmp_path / "cut").run["examples_seen"]
    assert seen < 160 * 120, "it ended before it was cut off"

    ip("link", "set", hosts[1], "up")
    for process in start_job(tmp_path / "cut", hosts):
        started.end(process)
    starts = [event["examples_seen"] for event in read_events(tmp_path / "cut/timing.jsonl")
              if event["event"] == "start"]
    assert starts == [0, seen]
    for process in started.start_job(
        tmp_path / "never", *SETTINGS, **started.SMALL, processes=len(hosts)
    ):
        started.end(process)
    assert started.bits_different(tmp_path / "cut", tmp_path / "never") == 0
    log, other = (tmp_path / name / "metrics.jsonl" for name in ("cut", "never"))
    assert log.read_bytes() == other.read_bytes()
