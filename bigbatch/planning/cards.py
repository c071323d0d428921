"""NVIDIA GPUs as devices that programs can be compiled for where there are none.

The compiler is XLA's in JAX's plugin for CUDA, on any x86 Linux machine and without a driver. It
chooses algorithms by rules, where on a real GPU it would try them.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import jax

from bigbatch.job import jax_private
from bigbatch.job.chips import TAKEN_BY_JAX, Gpu
from bigbatch.mistake import Mistake

CARDS_A_HOST = 8  # at most
# Where `make .cuda/installed` puts it in a checkout; else the environment's, if that has one.
PLUGINS = Path(__file__).parents[2] / ".cuda" / "jax_plugins"
COMPILER_OPTIONS = {"xla_gpu_autotune_level": 0}  # there is no GPU to try algorithms on

# By compute capability: shared memory of a multiprocessor and, of it, of a block; FP32 units of a
# multiprocessor; the second-level cache. From NVIDIA's tuning guides.
ARCHITECTURES = {
    (8, 0): (167_936, 166_912, 64, 40 * 2**20),
    (9, 0): (233_472, 232_448, 128, 50 * 2**20),
}
TARGET = """
gpu_device_info {{
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: {shared} shared_memory_per_block_optin: {shared_block}
  threads_per_core_limit: 2048 core_count: {cores} fpus_per_core: {units}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth} l2_cache_size: {cache} clock_rate_ghz: {clock}
  device_memory_size: {memory}
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
runtime_version {{ major: 13 }}
device_description_str: "{name}"
"""


def shape_of(cards: int) -> tuple[int, int] | None:
    """(hosts, cards of each) for so many cards; None where they fill no hosts of 8."""
    if 0 < cards <= CARDS_A_HOST:
        return 1, cards
    hosts, rest = divmod(cards, CARDS_A_HOST)
    return None if rest or cards < 1 else (hosts, CARDS_A_HOST)


def make_devices(kind: Gpu, shape: tuple[int, int]) -> Sequence[jax.Device]:
    """The cards of so many hosts (the first number), to compile for.

    Raises:
        Mistake: if JAX's plugin for CUDA is not there.
    """
    major, minor = kind.compute_capability
    shared, shared_block, units, cache = ARCHITECTURES[kind.compute_capability]
    target = TARGET.format(
        major=major, minor=minor, shared=shared, shared_block=shared_block, units=units,
        cache=cache, cores=kind.multiprocessors, bandwidth=int(kind.bytes_a_second),
        clock=kind.clock_hertz / 1e9, memory=int(kind.memory_bytes / TAKEN_BY_JAX),
        name=kind.device_kind)
    return jax_private.absent_gpus(_library(), target, "x".join(map(str, (1, *shape))))


def _library() -> Path:
    folders = [PLUGINS]
    if found := importlib.util.find_spec("jax_plugins"):
        folders += map(Path, found.submodule_search_locations or [])
    for folder in folders:
        for library in sorted(folder.glob("xla_cuda*/xla_cuda_plugin.so"), reverse=True):
            return library
    raise Mistake(
        "--topology needs JAX's plugin for CUDA to compile for GPUs: make .cuda/installed in a "
        "checkout, pip install jax-cuda13-pjrt elsewhere (x86 Linux; no GPU is needed)."
    )
