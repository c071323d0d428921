"""What compiling a program for a slice shows: memory, operations, collectives, estimated time."""

import contextlib
import hashlib
import json
import math
import re
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from bigbatch.job.chips import GIB, Tpu
from bigbatch.storage.logs import replace_text

COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-permute",
               "collective-broadcast", "send", "recv")
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}


class Measured(NamedTuple):
    """One device's part of a program, as the compiler made it."""

    fits: bool  # False: the compiler refused it for want of memory
    compile_seconds: float
    argument_bytes: int
    # Beyond its arguments: temporaries, code, and results that are not written over arguments. All
    # the compiler said it needs where it does not fit.
    extra_bytes: int
    flops: float
    seconds: float | None  # the compiler's estimate; without what collectives take
    collectives: dict[str, list[int]]  # by kind: how many, and the bytes of their results


def measure(lowered: jax.stages.Lowered, kind: Tpu, mesh: Mesh, folder: Path | None) -> Measured:
    """Compiles a program lowered for `mesh`, of devices of this kind; or remembers what it was.

    What was measured is remembered, and not the program: JAX cannot load programs that were
    compiled for absent devices back from its cache.

    Args:
        folder: where to remember; None for nowhere.
    """
    told = kind.version, kind.chip_config, kind.clock_hertz
    about = "\n".join((jax.__version__, version(mesh), repr(told), lowered.as_text()))
    file = folder and folder / f"{hashlib.sha256(about.encode()).hexdigest()}.json"
    if file and file.exists():
        return Measured(**json.loads(file.read_text(encoding="utf-8")))
    began = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        measured = Measured(
            False, time.perf_counter() - began, 0, _needed(str(error)), 0.0, None, {}
        )
    else:
        seconds, memory = time.perf_counter() - began, compiled.memory_analysis()
        text = compiled.as_text()
        measured = Measured(
            fits=True,
            compile_seconds=seconds,
            argument_bytes=memory.argument_size_in_bytes,
            extra_bytes=_extra_bytes(memory),
            flops=float(compiled.cost_analysis()["flops"]),
            seconds=estimated_seconds(text, kind.clock_hertz),
            collectives=collectives(text),
        )
    if file:
        with contextlib.suppress(OSError):  # to remember is a help, never a condition
            folder.mkdir(parents=True, exist_ok=True)
            replace_text(file, json.dumps(measured._asdict()))
    return measured


def memory_bytes(program: jax.stages.Compiled) -> int:
    """The bytes a device needs while a compiled program runs."""
    memory = program.memory_analysis()
    return memory.argument_size_in_bytes + _extra_bytes(memory)


def _extra_bytes(memory: Any) -> int:
    return (memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
            + memory.output_size_in_bytes - memory.alias_size_in_bytes)


def version(mesh: Mesh) -> str:
    """The version of the compiler for a mesh's devices."""
    return " ".join(mesh.devices.flat[0].client.platform_version.split())


def collectives(text: str) -> dict[str, list[int]]:
    """The collectives of a compiled program's text: {kind: [how many, bytes of their results]}."""
    found: dict[str, list[int]] = {}
    kinds = "|".join(COLLECTIVES)
    # An instruction is "%name = shape opcode(operands)"; asynchronous ones end in -start and -done.
    for shape, kind in re.findall(rf"= (.*?) ((?:ragged-)?(?:{kinds}))(?:-start)?\(", text):
        count, size = found.get(kind, (0, 0))
        found[kind] = [count + 1, size + shape_bytes(shape)]
    return found


def shape_bytes(shape: str) -> int:
    """The bytes of a shape as the compiler writes it, as f32[8,128]{1,0} or a tuple of such."""
    arrays = re.findall(r"\b(pred|bf16|[suf]\d+)\w*\[([\d,]*)\]", shape)
    return sum(
        math.prod(map(int, filter(None, sides.split(","))))
        * max(1, int(re.sub(r"\D", "", kind) or 8) // 8)
        for kind, sides in arrays
    )


def estimated_seconds(text: str, clock_hertz: float) -> float | None:
    """The compiler's estimate of one call of a program, from its text; None where it made none.

    The cycles of the entry computation's instructions. What is not in it: collectives, passes of a
    loop after the first, anything outside the device. XLA's other figure, `optimal_seconds`, is no
    bound: on v6e it gives a matrix product three times its time.
    """
    entry = text[text.index("\nENTRY "):]
    cycles = [int(found) for found in re.findall(r'"estimated_cycles":"(\d+)"', entry)]
    return sum(cycles) / clock_hertz if cycles else None


def _needed(error: str) -> int:
    """The bytes that a program needed, of the compiler's refusal."""
    amount = re.search(r"(?:required[^()]*\(|Used )([\d.]+)([KMGT]?)", error)
    return int(float(amount[1]) * UNITS[amount[2]]) if amount else 0
