"""The machine that runs are trained on: its cores, and what JAX finds."""

import functools
import os
import subprocess
import sys


def own_cores() -> list[int]:
    """The processor cores that this process may use, by number."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


@functools.cache
def jax_devices() -> tuple[str, str]:
    """JAX's backend (cpu, gpu, tpu), and its devices as "1 x NVIDIA H100 80GB HBM3".

    JAX is asked in a process of its own, since the process that asks takes the accelerator.

    Raises:
        RuntimeError: with JAX's error, if JAX does not start.
    """
    asked = subprocess.run(
        [sys.executable, "-c", "import jax; d = jax.devices(); "
         "print(jax.default_backend(), len(d), 'x', d[0].device_kind)"],
        capture_output=True, text=True, check=False,
    )
    if asked.returncode:
        raise RuntimeError(f"JAX does not start here:\n{asked.stderr[-2000:]}")
    backend, _, text = asked.stdout.strip().splitlines()[-1].partition(" ")
    return backend, text
