"""Real processes of the main job: alone, or several as one job on this machine."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from bigbatch.storage import checkpoint
from bigbatch.storage.logs import read_events
from tests.support.configs import TINY

REPOSITORY = Path(__file__).parents[2]
# For `start`: a run whose processes are ready to train in a few seconds.
SMALL = {"file": "tests/support/small_config.py", "config": ("resident",)}
# Kept between test runs, and apart from the cache that the test processes themselves fill.
CACHE = REPOSITORY / ".jax_cache" / "main"


def start(
    workdir: Path, *settings: str, devices: int = 1, flags: tuple[str, ...] = (),
    cache: Path | None = CACHE, file: str = "configs/digits.py", config: tuple[str, ...] = TINY,
    process: tuple[int, int] = (0, 1), port: int = 0, host: str = "127.0.0.1",
    on: tuple[str, ...] = (), before: str = "",
) -> subprocess.Popen:
    """Starts `python -m bigbatch.main` on the tiny config with `key=value` settings.

    Args:
        workdir: of the run.
        devices: CPU devices of this process.
        flags: more of the command line.
        cache: for compiled programs; None for none.
        file: the config's.
        config: preset and settings of that file.
        process: which process of how many; `port` of the first one is then needed.
        port: see `free_port`.
        host: of the first one.
        on: the command that runs this one on its host.
        before: Python that the process runs first.
    """
    index, count = process
    job = (f"--coordinator={host}:{port}", f"--processes={count}", f"--process={index}")
    program = ("-m", "bigbatch.main")
    if before:
        program = ("-c", f"{before}\nimport runpy\n"
                   "runpy.run_module('bigbatch.main', run_name='__main__')")
    return start_python(
        *program, f"--config={file}:{','.join([*config, *settings])}",
        f"--workdir={workdir}", f"--compilation_cache={cache or ''}",
        *(job if count > 1 else ()), *flags, devices=devices, on=on,
    )


def start_python(
    *arguments: str, devices: int = 1, on: tuple[str, ...] = (), **environment: str
) -> subprocess.Popen:
    """Starts Python with CPU devices; see `start`. `environment` is added to this process's."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    } | environment
    # So that it keeps what a user's process keeps, also programs that compile quickly.
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        environment.pop(name, None)
    # A TPU's compiler, where a test before has loaded it, has this process ignore the signal, and
    # what is ignored is inherited.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    return subprocess.Popen(
        [*on, sys.executable, *arguments], cwd=REPOSITORY, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )


def start_job(workdir: Path, *settings: str, processes: int, **options) -> list[subprocess.Popen]:
    """Starts the processes of one job; see `start`."""
    port = free_port()
    return [
        start(workdir, *settings, process=(index, processes), port=port, **options)
        for index in range(processes)
    ]


def end(process: subprocess.Popen, status: int = 0, seconds: float = 240) -> str:
    """Waits for a process and returns what it printed; fails unless it ends with `status`."""
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        pytest.fail(f"still running after {seconds} s; it had printed:\n{output}")
    assert process.returncode == status, f"ended with {process.returncode}:\n{output}"
    return output


def assert_same_lines(workdir: Path, other: Path) -> list[dict[str, Any]]:
    """That two runs in float64 have one metrics.jsonl but for rounding; returns its lines."""
    lines, wanted = (read_events(path / "metrics.jsonl") for path in (workdir, other))
    for line, twin in zip(lines, wanted, strict=True):
        assert line.keys() == twin.keys()
        for key, value in line.items():
            # What is measured of the noise are small differences of large numbers.
            is_measured = key.startswith("noise_") and key != "noise_scale"
            rel = 1e-8 if is_measured else 1e-10
            assert value == twin[key] or value == pytest.approx(twin[key], rel=rel), key
    return lines


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


def wait_until(
    ready: Callable[[], bool], process: subprocess.Popen, what: str, seconds: float = 240
) -> None:
    """Waits for something that `process` does; fails if it ends before, or takes too long."""
    until = time.monotonic() + seconds
    while not ready():
        if process.poll() is not None:
            pytest.fail(f"ended before {what}:\n{process.communicate()[0]}")
        if time.monotonic() > until:
            process.kill()
            pytest.fail(f"{seconds} s without {what}:\n{process.communicate()[0]}")
        time.sleep(0.002)


def bits_different(workdir: Path, other: Path) -> int:
    """How many bits of parameters, statistics and optimizer state differ between two runs' ends."""
    return bits_between(*(checkpoint.load(folder) for folder in (workdir, other)))


def bits_between(first: Any, second: Any) -> int:
    """How many bits differ between two trees of the same arrays."""
    assert jax.tree.structure(first) == jax.tree.structure(second)
    count = 0
    for leaf, twin in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert (leaf.dtype, leaf.shape) == (twin.dtype, twin.shape)
        pair = (np.frombuffer(array.tobytes(), np.uint8) for array in (leaf, twin))
        count += int(np.unpackbits(np.bitwise_xor(*pair)).sum())
    return count


def relative_difference(workdir: Path, other: Path) -> float:
    """||a - b|| / ||b|| over the parameters of two runs' ends."""
    first, second = (
        np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(state["params"])])
        for state in map(checkpoint.load, (workdir, other))
    )
    return float(np.linalg.norm(first - second) / np.linalg.norm(second))
