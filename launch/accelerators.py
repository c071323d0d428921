"""What the names of Cloud TPU slices mean: the kind of TPU, how many chips, how they lie."""

import re
from typing import NamedTuple

import repository  # noqa: F401  (makes the package importable)

from bigbatch.job.chips import TPUS, Tpu


class Slice(NamedTuple):
    """A Cloud TPU slice."""

    name: str  # as Cloud TPU and xpk write it
    tpu: Tpu
    chips: int  # what is paid for
    topology: str  # as GKE writes it; "" where it does not follow from the number of chips


_FLAT = {4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}


def parse(name: str) -> Slice:
    """The slice of that name, for example "v2-256": 256 cores on 128 chips.

    Raises:
        ValueError: if it is no name of a slice.
    """
    found = re.fullmatch(r"([a-z0-9]+)-([1-9][0-9]*)", name)
    if not found or found[1] not in TPUS:
        raise ValueError(f"{name!r} is no slice; they are called {', '.join(TPUS)} and a number, "
                         "for example v2-256, v4-64 (TensorCores), v5litepod-16, v6e-32 (chips).")
    tpu = TPUS[found[1]]
    chips, rest = divmod(int(found[2]), tpu.units_a_chip)
    if rest:
        raise ValueError(f"{name!r}: the number counts TensorCores, of which a chip has "
                         f"{tpu.cores_a_chip}.")
    return Slice(name, tpu, chips, _FLAT.get(chips, "") if tpu.dimensions == 2 else "")
