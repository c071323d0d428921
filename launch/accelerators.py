"""What the names of Cloud TPU slices mean: cores, chips, the software they are created with."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Slice:
    """A Cloud TPU slice.

    Attributes:
        name: as Cloud TPU and xpk write it.
        cores: TensorCores.
        chips: what is paid for; 1 or 2 cores each.
        runtime_version: the virtual machines' software. https://cloud.google.com/tpu/docs/runtimes
        gke_accelerator: GKE's label; "" where these recipes know none.
        topology: of the chips, as GKE writes it; "" where it does not follow from the number.
    """

    name: str
    cores: int
    chips: int
    runtime_version: str
    gke_accelerator: str
    topology: str


# Kind: what its number counts, cores a chip, software, GKE's label.
_KINDS = {
    "v2": ("cores", 2, "tpu-ubuntu2204-base", ""),
    "v3": ("cores", 2, "tpu-ubuntu2204-base", ""),
    "v4": ("cores", 2, "tpu-ubuntu2204-base", "tpu-v4-podslice"),
    "v5p": ("cores", 2, "v2-alpha-tpuv5", "tpu-v5p-slice"),
    "v5litepod": ("chips", 1, "v2-alpha-tpuv5-lite", "tpu-v5-lite-podslice"),
    "v6e": ("chips", 1, "v2-alpha-tpuv6e", "tpu-v6e-slice"),
}
_FLAT = {4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}


def parse(name: str) -> Slice:
    """The slice of that name, for example "v2-256": 256 cores on 128 chips.

    Raises:
        ValueError: if it is no name of a slice.
    """
    found = re.fullmatch(r"([a-z0-9]+)-([1-9][0-9]*)", name)
    if not found or found[1] not in _KINDS:
        raise ValueError(f"{name!r} is no slice; they are called {', '.join(_KINDS)} and a number, "
                         "for example v2-256, v4-64 (TensorCores), v5litepod-16, v6e-32 (chips).")
    counts, cores_a_chip, runtime, gke = _KINDS[found[1]]
    number = int(found[2])
    if counts == "cores" and number % cores_a_chip:
        raise ValueError(f"{name!r}: the number counts TensorCores, of which a chip has 2.")
    chips = number // cores_a_chip if counts == "cores" else number
    topology = _FLAT.get(chips, "") if counts == "chips" else ""
    return Slice(name, chips * cores_a_chip, chips, runtime, gke, topology)
