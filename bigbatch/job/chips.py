"""One table of the chips that are known: their peaks, memory, clocks and names. Plain Python.

`topology` compiles for the TPUs in it, a run holds its operations against the peaks, and `launch/`
creates slices by the names in it.
"""

from typing import NamedTuple

GIB = 2**30


class Tpu(NamedTuple):
    """A generation of TPU. A device is what JAX calls one: a core of v2 and v3, else a chip."""

    device_kind: str  # as JAX spells it
    peak_flops: float  # of a device, dense, in bfloat16; Google's published figure
    version: str  # as libtpu spells it
    dimensions: int  # of the network between chips
    numbered_by: str  # what the number in a name counts: cores (v2-8), chips (v5litepod-8)
    cores_a_chip: int
    devices_a_chip: int  # the two cores of v4 and v5p work as one
    # What the published peak gives with the size and number of the matrix units, as
    # 22.5e12 / (2 x 128 x 128) for v2.
    clock_hertz: float
    memory_bytes: int  # of a device; what the compiler says a program may use
    runtime_version: str  # of Cloud TPU machines: https://cloud.google.com/tpu/docs/runtimes
    gke_label: str = ""  # GKE's name; "" where the scripts of launch/ know none
    chip_config: str = ""  # as libtpu spells it, where its default is not what JAX runs on

    @property
    def units_a_chip(self) -> int:
        """What a chip adds to the number in a slice's name."""
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

# Of a GPU by the type that its matrix units multiply, dense; NVIDIA's data sheets of the SXM
# boards. The PCIe boards of the H100 and H200 are clocked lower and are left unknown.
_A100 = {"bfloat16": 312e12, "tf32": 156e12}
_HOPPER = {"bfloat16": 989e12, "tf32": 494.7e12}
GPU_PEAKS = {
    "NVIDIA A100-SXM4-40GB": _A100, "NVIDIA A100-SXM4-80GB": _A100,
    "NVIDIA A100-PCIE-40GB": _A100, "NVIDIA A100 80GB PCIe": _A100,
    "NVIDIA H100 80GB HBM3": _HOPPER, "NVIDIA H200": _HOPPER,
}
TPU_PEAKS = {tpu.device_kind: tpu.peak_flops for tpu in TPUS.values()}


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """The most floating-point operations a second of one device; None where that is not known.

    At JAX's default precision float32 is multiplied in one pass of bfloat16 on TPUs and as tf32 on
    these GPUs, so these are the peaks taken for it. In float64 none is taken.

    Args:
        device_kind: as JAX spells it.
        dtype: that the network computes in, as `config.dtype`.
    """
    if dtype not in ("bfloat16", "float32"):
        return None
    if device_kind in TPU_PEAKS:
        return TPU_PEAKS[device_kind]
    return GPU_PEAKS.get(device_kind, {}).get("bfloat16" if dtype == "bfloat16" else "tf32")
