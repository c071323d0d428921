"""Slices of Cloud TPU, and GPUs, by name: devices to compile programs for where there are none.

The compiler for TPUs is libtpu's, which compiles for every slice on any x86 Linux machine; that for
GPUs is in `cards`. Names are those of Cloud TPU (v2-256, v5litepod-16) or the shape of the chips
(v2:8x16). GPUs are named by their number (h100-8; from 8 on in hosts of 8), or as hosts x cards of
each (h100:2x4).
"""

import math
import os
import re
from pathlib import Path
from typing import NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from bigbatch.job import devices
from bigbatch.job.chips import GPUS, TPUS, Gpu, Tpu
from bigbatch.mistake import Mistake
from bigbatch.planning import cards

# Where `make .tpu/installed` puts it in a checkout: in the environment itself JAX would look for a
# TPU each time. Where it is not there JAX finds the libtpu of the environment, if that has one.
LIBTPU = Path(__file__).parents[2] / ".tpu" / "libtpu" / "libtpu.so"
SPELLINGS = {"v5e": "v5litepod"}
EXAMPLES = ("v2-256, v3-32, v4-64, v5litepod-16, v6e-64, or the shape of its chips, as v2:8x16; "
            "GPUs are h100-8, or hosts and cards, as h100:2x8")


class Slice(NamedTuple):
    """A slice, or hosts of GPUs, by the name it was asked for."""

    name: str
    shape: tuple[int, ...]  # of the chips; of GPUs (hosts, cards of each)
    kind: Tpu | Gpu

    @property
    def chips(self) -> int:
        """How many it has."""
        return math.prod(self.shape)

    @property
    def devices(self) -> int:
        """How many devices JAX sees: cores, or for v4 and v5p chips."""
        return self.chips * self.kind.devices_a_chip

    @property
    def one_host(self) -> "Slice":
        """The slice of the same kind that has one host; of GPUs a single one."""
        if isinstance(self.kind, Gpu):
            return parse(f"{self.kind.version}-1")
        return parse(f"{self.kind.version}:{_shape_text(self.kind, 4)}")


def parse(name: str) -> Slice:
    """The slice of a name; nothing is asked of the compiler.

    Raises:
        Mistake: if there is no such slice.
    """
    match = re.fullmatch(r"([a-z0-9]+)(?:-(\d+)|:(\d+(?:x\d+)+))", name)
    kind_name = match and SPELLINGS.get(match[1], match[1])
    if kind_name in GPUS:
        return _gpus(name, GPUS[kind_name], match[2] or match[3])
    if kind_name not in TPUS:
        known = ", ".join((*TPUS, *GPUS))
        raise Mistake(f"--topology names {name!r}; a slice is {EXAMPLES}. Known are {known}.")
    kind = TPUS[kind_name]
    if match[3]:
        shape = tuple(map(int, match[3].split("x")))
        if len(shape) != kind.dimensions or not all(shape):
            raise Mistake(
                f"--topology names {name!r}, but the chips of {kind_name} lie in "
                f"{kind.dimensions} dimensions, as {_shape_text(kind, 16)}."
            )
        return Slice(name, shape, kind)
    least, unit = kind.units_a_chip, kind.numbered_by
    chips, rest = divmod(int(match[2]), least)
    if rest or chips < 1 or chips & (chips - 1):
        raise Mistake(
            f"--topology names {name!r}, but {kind_name} comes in {unit} of {least * 4}, "
            f"{least * 8}, {least * 16} and so on; for another shape write it out, as "
            f"{match[1]}:{_shape_text(kind, 16)}."
        )
    return Slice(name, _shape(kind, chips), kind)


def _gpus(name: str, kind: Gpu, amount: str) -> Slice:
    """So many GPUs ("16"), or hosts and cards of each ("2x8")."""
    numbers = tuple(map(int, amount.split("x")))
    shape = cards.shape_of(*numbers) if len(numbers) == 1 else numbers
    if not shape or len(shape) != 2 or not all(shape) or shape[1] > cards.CARDS_A_HOST:
        most = cards.CARDS_A_HOST
        raise Mistake(
            f"--topology names {name!r}, but GPUs come as 1 to {most}, {2 * most}, {3 * most} and "
            f"so on, or written out as hosts and cards of each, as {kind.version}:2x4."
        )
    return Slice(name, shape, kind)


def compile_elsewhere() -> None:
    """To be called before JAX is used where programs are compiled for slices that are not here."""
    # A machine whose accelerators train something else can still plan.
    jax.config.update("jax_platforms", "cpu")
    # JAX cannot load what it compiled for devices that are not there, and would say so each time.
    jax.config.update("jax_enable_compilation_cache", False)


def make_mesh(found: Slice, shards: int = 0) -> Mesh:
    """The slice's devices, to compile for.

    Args:
        found: the slice.
        shards: see `devices.make_mesh`.

    Raises:
        Mistake: if the compiler is not there, or knows no such slice; or if `shards` does not
            divide its number of devices.
    """
    if isinstance(found.kind, Gpu):
        return devices.make_mesh(cards.make_devices(found.kind, found.shape), shards)
    if LIBTPU.exists():
        os.environ.setdefault("TPU_LIBRARY_PATH", str(LIBTPU))
    # Else libtpu asks the network and the environment which TPU this machine has, and says at
    # length that it has none.
    for key, value in (
        ("TPU_SKIP_MDS_QUERY", "1"), ("TPU_ACCELERATOR_TYPE", "v2-8"),
        ("TPU_WORKER_HOSTNAMES", "localhost"), ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
    ):
        os.environ.setdefault(key, value)
    shape, config = "x".join(map(str, found.shape)), found.kind.chip_config
    options = {"chip_config_name": config} if config else {}
    try:
        topology = topologies.get_topology_desc(f"{found.kind.version}:{shape}", "tpu", **options)
    except (jax.errors.JaxRuntimeError, RuntimeError, OSError) as error:
        text = str(error).partition("\n")[0]
        if "TPU support not installed" in text or "libtpu" in text or "open" in text:
            raise Mistake(
                "--topology needs the TPU compiler: make .tpu/installed in a checkout, pip install "
                f"libtpu elsewhere (x86 Linux; no TPU is needed). JAX says: {text}"
            ) from None
        raise Mistake(f"--topology names {found.name!r}; the compiler says: {text}") from None
    return devices.make_mesh(topology.devices, shards)


def _shape(kind: Tpu, chips: int) -> tuple[int, ...]:
    """The shape of a slice of so many chips, a power of 2: near to a square or a cube."""
    if kind.dimensions == 3 and chips <= 4:
        return (1, 1, 1) if chips == 1 else (chips // 2, 2, 1)
    halvings = chips.bit_length() - 1
    parts = [(halvings + at) // kind.dimensions for at in range(kind.dimensions)]
    return tuple(2**part for part in parts)


def _shape_text(kind: Tpu, chips: int) -> str:
    return "x".join(map(str, _shape(kind, chips)))
