"""All uses of JAX's private modules, so that an upgrade of JAX can break only this file.

- `job_state`: the job's key-value store, and the number of this process, for which JAX has no
  public API (`jax.process_index` would initialise the devices).
- `running_in_cloud_tpu_vm`: whether this is a Cloud TPU host, where JAX finds the job's processes.
- `decompress_executable`: raises if an entry of the compilation cache is incomplete.
- `analyse_cost`: XLA's cost analysis of a program by another platform than its own.
"""

from typing import Any

from jax._src import distributed
from jax._src.cloud_tpu_init import running_in_cloud_tpu_vm
from jax._src.compilation_cache import decompress_executable
from jax._src.lib import _jax

job_state = distributed.global_state


def analyse_cost(client: Any, module: Any) -> dict[str, float]:
    """XLA's cost analysis of an HLO module for the platform of `client`."""
    return _jax.hlo_module_cost_analysis(client, module)


__all__ = ["analyse_cost", "decompress_executable", "job_state", "running_in_cloud_tpu_vm"]
