"""A table of known chips: peak FLOP/s, memory, clocks and names. Plain Python.

`planning.topology` compiles for these TPUs and GPUs, a run divides its FLOP/s by the peak, and
`launch/` creates slices by these names.
"""

from typing import NamedTuple

GIB = 2**30


class Tpu(NamedTuple):
    """A generation of TPU. As in JAX, a device is one core of v2 and v3, and one chip of others."""

    device_kind: str  # as JAX spells it
    peak_flops: float  # FLOP/s of a device, dense, in bfloat16, as Google publishes it
    version: str  # as libtpu spells it
    dimensions: int  # of the network between chips
    numbered_by: str  # the number in a slice's name counts cores (v2-8) or chips (v5litepod-8)
    cores_a_chip: int
    devices_a_chip: int  # the two cores of v4 and v5p work as one
    # Computed from the published peak and the size and number of the matrix units, for v2 as
    # 22.5e12 / (2 x 128 x 128).
    clock_hertz: float
    memory_bytes: int  # of a device, as much as the compiler lets a program use
    runtime_version: str  # of Cloud TPU machines: https://cloud.google.com/tpu/docs/runtimes
    gke_label: str = ""  # GKE's name; "" where launch/ has no script for GKE
    chip_config: str = ""  # as libtpu spells it; "" where JAX runs on libtpu's default

    @property
    def units_a_chip(self) -> int:
        """How much each chip adds to the number in a slice's name."""
        return self.cores_a_chip if self.numbered_by == "cores" else 1


TPUS = {
    "v2": Tpu("TPU v2", 22.5e12, "v2", 2, "cores", 2, 2, 0.70e9, int(7.48 * GIB),
              "tpu-ubuntu2204-base"),
    "v3": Tpu("TPU v3", 61.5e12, "v3", 2, "cores", 2, 2, 0.94e9, int(15.48 * GIB),
              "tpu-ubuntu2204-base"),
    "v4": Tpu("TPU v4", 275e12, "v4", 3, "cores", 2, 1, 1.05e9, int(30.75 * GIB),
              "tpu-ubuntu2204-base", "tpu-v4-podslice", "megacore"),
    "v5litepod": Tpu("TPU v5 lite", 197e12, "v5e", 2, "chips", 1, 1, 1.50e9, int(15.75 * GIB),
                     "v2-alpha-tpuv5-lite", "tpu-v5-lite-podslice"),
    "v5p": Tpu("TPU v5", 459e12, "v5p", 3, "cores", 2, 1, 1.75e9, int(95.73 * GIB),
               "v2-alpha-tpuv5", "tpu-v5p-slice"),
    "v6e": Tpu("TPU v6 lite", 918e12, "v6e", 2, "chips", 1, 1, 1.75e9, int(31.24 * GIB),
               "v2-alpha-tpuv6e", "tpu-v6e-slice"),
}

# Peak FLOP/s of a GPU, dense, by the type that its matrix units multiply; from NVIDIA's data
# sheets of the SXM boards. The PCIe boards of the H100 and H200 have lower clocks and are left out.
_A100 = {"bfloat16": 312e12, "tf32": 156e12}
_HOPPER = {"bfloat16": 989e12, "tf32": 494.7e12}
GPU_PEAKS = {
    "NVIDIA A100-SXM4-40GB": _A100, "NVIDIA A100-SXM4-80GB": _A100,
    "NVIDIA A100-PCIE-40GB": _A100, "NVIDIA A100 80GB PCIe": _A100,
    "NVIDIA H100 80GB HBM3": _HOPPER, "NVIDIA H200": _HOPPER,
}


class Gpu(NamedTuple):
    """A kind of NVIDIA GPU, on an SXM board. The numbers are from NVIDIA's data sheets."""

    device_kind: str  # as JAX spells it
    version: str  # its name in --topology
    bytes_a_second: float  # of its memory
    memory_bytes: int  # of a device, as much as JAX takes of it
    compute_capability: tuple[int, int]
    multiprocessors: int
    clock_hertz: float
    devices_a_chip: int = 1

    @property
    def peak_flops(self) -> float:
        """FLOP/s, dense, in bfloat16."""
        return GPU_PEAKS[self.device_kind]["bfloat16"]


TAKEN_BY_JAX = 0.75  # of a GPU's memory, unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise
GPUS = {
    "a100": Gpu("NVIDIA A100-SXM4-80GB", "a100", 2.039e12, int(TAKEN_BY_JAX * 79.2 * GIB),
                (8, 0), 108, 1.41e9),
    "h100": Gpu("NVIDIA H100 80GB HBM3", "h100", 3.352e12, int(TAKEN_BY_JAX * 79.1 * GIB),
                (9, 0), 132, 1.98e9),
    "h200": Gpu("NVIDIA H200", "h200", 4.8e12, int(TAKEN_BY_JAX * 139.8 * GIB),
                (9, 0), 132, 1.98e9),
}
TPU_PEAKS = {tpu.device_kind: tpu.peak_flops for tpu in TPUS.values()}


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """The peak floating-point operations per second of one device; None if it is unknown.

    At JAX's default precision TPUs multiply float32 in one bfloat16 pass, and these GPUs multiply
    it as tf32. So the peaks of those types stand for float32. For float64 there is none.

    Args:
        device_kind: as JAX spells it.
        dtype: `config.dtype`, in which the network computes.
    """
    if dtype not in ("bfloat16", "float32"):
        return None
    if device_kind in TPU_PEAKS:
        return TPU_PEAKS[device_kind]
    return GPU_PEAKS.get(device_kind, {}).get("bfloat16" if dtype == "bfloat16" else "tf32")
