"""All that is taken from JAX's private modules, so that an upgrade of JAX breaks one file.

- `job_state`: the job's key-value store, and which process this is. JAX has no public way to them.
- `running_in_cloud_tpu_vm`: whether the platform says by itself who belongs to the job.
- `decompress_executable`: whether an entry of the compilation cache is whole.
- `analyse_cost`: XLA's cost analysis of a program for another platform than its own.
"""

from typing import Any

from jax._src import distributed
from jax._src.cloud_tpu_init import running_in_cloud_tpu_vm
from jax._src.compilation_cache import decompress_executable
from jax._src.lib import _jax

job_state = distributed.global_state


def analyse_cost(client: Any, module: Any) -> dict[str, float]:
    """XLA's cost analysis of an HLO module by a client's rules."""
    return _jax.hlo_module_cost_analysis(client, module)


__all__ = ["analyse_cost", "decompress_executable", "job_state", "running_in_cloud_tpu_vm"]
