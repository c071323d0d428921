"""All uses of JAX's private modules, so that an upgrade of JAX can break only this file.

- `job_state`: the job's key-value store, and the number of this process, for which JAX has no
  public API (`jax.process_index` would initialise the devices).
- `running_in_cloud_tpu_vm`: whether this is a Cloud TPU host, where JAX finds the job's processes.
- `decompress_executable`: raises if an entry of the compilation cache is incomplete.
- `analyse_cost`: XLA's cost analysis of a program by another platform than its own.
- `absent_gpus`: GPUs to compile for, which JAX's public API has for TPUs alone.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jax._src import distributed
from jax._src.cloud_tpu_init import running_in_cloud_tpu_vm
from jax._src.compilation_cache import decompress_executable
from jax._src.lib import _jax, xla_client
from jax.experimental import topologies

job_state = distributed.global_state


def analyse_cost(client: Any, module: Any) -> dict[str, float]:
    """XLA's cost analysis of an HLO module for the platform of `client`."""
    return _jax.hlo_module_cost_analysis(client, module)


def absent_gpus(library: Path, target: str, shape: str) -> Sequence[Any]:
    """Devices to compile for with JAX's plugin for CUDA, on a machine that has none.

    Args:
        library: the plugin.
        target: the card, as the text of XLA's GpuTargetConfigProto.
        shape: partitions x hosts x cards of a host, as "1x2x8".
    """
    topology = xla_client.make_c_api_device_topology(
        _cuda_plugin(library), "", target_config=target, topology=shape)
    return topologies.TopologyDescription(topology._make_compile_only_devices()).devices


@functools.cache  # a process may load it once
def _cuda_plugin(library: Path) -> Any:
    name = "absent_cuda"  # "cuda" is the one that JAX itself loads where it is installed
    plugin = xla_client.load_pjrt_plugin_dynamically(name, str(library))
    xla_client.initialize_pjrt_plugin(name)
    return plugin


__all__ = ["absent_gpus", "analyse_cost", "decompress_executable", "job_state",
           "running_in_cloud_tpu_vm"]
