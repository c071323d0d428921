"""All uses of JAX's private modules, so that an upgrade of JAX can break only this file.

- `job_state`: the job's key-value store, and the number of this process, for which JAX has no
  public API (`jax.process_index` would initialise the devices).
- `running_in_cloud_tpu_vm`: whether this is a Cloud TPU host, where JAX finds the job's processes.
- `decompress_executable`: raises if an entry of the compilation cache is incomplete.
- `cache_seen_as`: lets a thread see another compilation cache than JAX's.
- `analyse_cost`: XLA's cost analysis of a program by another platform than its own.
- `absent_gpus`: GPUs to compile for, which JAX's public API has for TPUs alone.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import jax
from jax._src import compilation_cache, distributed
from jax._src import config as jax_config
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


@contextlib.contextmanager
def cache_seen_as(instead_of: Callable[[Any], Any], any_folder: bool) -> Iterator[None]:
    """Within the block and in its thread, JAX uses `instead_of(cache)` as its compilation cache.

    It is not called where JAX keeps no programs. A cache has two methods: `get(key)` returns an
    entry or None, and JAX compiles where it is None or cannot be loaded. Then the first process of
    a job calls `put(key, entry)`, and no other one does. The key is a digest of the traced program,
    the versions of jaxlib and of the platform, the devices' kind and topology, and the flags and
    options of XLA.

    Args:
        instead_of: see above.
        any_folder: whether a key must be the same on a machine where the cache is in another
            folder. In JAX 0.10 it has the folder in which XLA keeps what it measured of GPUs. So
            this option is unset, except on a GPU, where it is of use.
    """
    token = _instead_of.set(instead_of)
    try:
        with (jax_config.persistent_cache_enable_xla_caches("")
              if any_folder and jax.default_backend() != "gpu" else contextlib.nullcontext()):
            yield
    finally:
        _instead_of.reset(token)


_instead_of: ContextVar[Callable[[Any], Any] | None] = ContextVar("instead_of", default=None)
_cache_of_jax = compilation_cache._get_cache


def _cache_in_use(backend: Any) -> Any:
    cache, instead_of = _cache_of_jax(backend), _instead_of.get()
    return cache if cache is None or instead_of is None else instead_of(cache)


compilation_cache._get_cache = _cache_in_use


@functools.cache  # a process may load it once
def _cuda_plugin(library: Path) -> Any:
    name = "absent_cuda"  # "cuda" is the one that JAX itself loads where it is installed
    plugin = xla_client.load_pjrt_plugin_dynamically(name, str(library))
    xla_client.initialize_pjrt_plugin(name)
    return plugin


__all__ = ["absent_gpus", "analyse_cost", "cache_seen_as", "decompress_executable", "job_state",
           "running_in_cloud_tpu_vm"]
