"""What compiling a program for a slice shows: memory, FLOP, collectives and estimated time."""

import contextlib
import hashlib
import json
import os
import re
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from bigbatch.job.chips import GIB, Gpu, Tpu
from bigbatch.job.devices import compiler_options
from bigbatch.planning import cards
from bigbatch.planning.kernels import kernels, least_seconds, shape_bytes
from bigbatch.programs.compilation import count_flops
from bigbatch.storage.logs import replace_text

COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-permute",
               "collective-broadcast", "send", "recv")
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}


class Measured(NamedTuple):
    """What the compiler says of one device's part of a program."""

    fits: bool  # False: the compiler refused the program for want of memory
    compile_seconds: float
    argument_bytes: int  # 0 if the program does not fit
    # Memory beside the arguments: temporaries, code, and results that are not written over
    # arguments. If the program does not fit, all the memory that the compiler says it needs.
    extra_bytes: int
    flops: float
    # The compiler's estimate of one call, without collectives. For a GPU a lower bound.
    seconds: float | None
    collectives: dict[str, list[int]]  # {kind: [how many, bytes of their results]}
    temporary_bytes: int = 0
    accessed_bytes: float = 0.0  # read and written by all instructions, by the compiler's count
    operations: int = 0  # of the program as it was lowered
    instructions: int = 0  # of the program as it was compiled, those within fusions too
    # That a GPU launches. On a TPU those written by hand (Pallas), which are in no count above but
    # that of instructions: the compiler knows nothing of their work and time.
    kernels: int = 0


def measure(
    lowered: jax.stages.Lowered, kind: Tpu | Gpu, mesh: Mesh, folder: Path | None,
    deterministic: bool = False,
) -> Measured:
    """Compiles a program and returns what the compiler says of it, or reads that from `folder`.

    The folder keeps these results and not the program, because JAX cannot load a program that was
    compiled for absent devices from its compilation cache.

    Args:
        lowered: the program, lowered for `mesh`.
        kind: of the devices of `mesh`.
        mesh: the devices.
        folder: for the results; None to keep none.
        deterministic: as `lowered` was made, see `compiler_options`; its text does not say.
    """
    on_gpu = isinstance(kind, Gpu)
    settings = kind if on_gpu else (kind.version, kind.chip_config, kind.clock_hertz)
    lowered_text = lowered.as_text()
    key = "\n".join((jax.__version__, version(mesh), repr(settings), repr(Measured._fields),
                     repr(compiler_options(mesh, deterministic)), lowered_text))
    key += _options_in_environment(on_gpu)
    file = folder and folder / f"{hashlib.sha256(key.encode()).hexdigest()}.json"
    if file and file.exists():
        return Measured(**json.loads(file.read_text(encoding="utf-8")))
    began = time.perf_counter()
    try:
        compiled = lowered.compile(cards.COMPILER_OPTIONS if on_gpu else None)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        measured = Measured(
            False, time.perf_counter() - began, 0, _needed(str(error)), 0.0, None, {}
        )
    else:
        seconds, memory = time.perf_counter() - began, compiled.memory_analysis()
        text = compiled.as_text()
        costs = _costs_on_gpu(lowered, text, kind) if on_gpu else _costs(compiled, text, kind)
        measured = Measured(
            fits=True,
            compile_seconds=seconds,
            argument_bytes=memory.argument_size_in_bytes,
            extra_bytes=_extra_bytes(memory),
            collectives=collectives(text),
            temporary_bytes=memory.temp_size_in_bytes,
            operations=lowered_text.count(" = "),
            instructions=text.count(" = "),
            **costs,
        )
    if file:
        with contextlib.suppress(OSError):  # a result that is not kept is only compiled again
            folder.mkdir(parents=True, exist_ok=True)
            replace_text(file, json.dumps(measured._asdict()))
    return measured


def _options_in_environment(on_gpu: bool) -> str:
    """The compiler's options that the environment sets, but how many devices a CPU shows."""
    given = os.environ.get("XLA_FLAGS" if on_gpu else "LIBTPU_INIT_ARGS", "").split()
    return " ".join(one for one in given if "xla_force_host_platform_device_count" not in one)


def _costs(compiled: jax.stages.Compiled, text: str, kind: Tpu) -> dict[str, Any]:
    """The fields of `Measured` on work and time, by the TPU's compiler."""
    counted = compiled.cost_analysis()
    return {"flops": float(counted["flops"]), "accessed_bytes": float(counted["bytes accessed"]),
            "seconds": estimated_seconds(text, kind.clock_hertz),
            "kernels": text.count('custom_call_target="tpu_custom_call"')}


def _costs_on_gpu(lowered: jax.stages.Lowered, text: str, kind: Gpu) -> dict[str, Any]:
    """The same for a GPU, whose compiler counts nothing where there is none."""
    launched, flops = kernels(text), count_flops(lowered) or 0.0
    return {"flops": flops, "accessed_bytes": float(sum(launched)), "kernels": len(launched),
            "seconds": least_seconds(launched, kind, flops)}


def memory_bytes(program: jax.stages.Compiled) -> int:
    """The bytes that a compiled program needs on each device, with its arguments."""
    memory = program.memory_analysis()
    return memory.argument_size_in_bytes + _extra_bytes(memory)


def _extra_bytes(memory: Any) -> int:
    return (memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
            + memory.output_size_in_bytes - memory.alias_size_in_bytes)


def version(mesh: Mesh) -> str:
    """The version of the compiler for the devices of `mesh`."""
    return " ".join(mesh.devices.flat[0].client.platform_version.split())


def collectives(text: str) -> dict[str, list[int]]:
    """The collectives in the HLO text of a compiled program: see `Measured.collectives`."""
    found: dict[str, list[int]] = {}
    kinds, seen = "|".join(COLLECTIVES), set()
    # An instruction is "%name = shape opcode(operands)"; asynchronous ones end in -start and -done.
    for shape, kind, rest in re.findall(
            rf"= (.*?) ((?:ragged-)?(?:{kinds}))(?:-start)?\((.*)", text):
        # A TPU's compiler may cut one into parts, of each of which it writes down the whole.
        if chain := re.search(r'chain_id="(\d+)"', rest):
            if (kind, chain[1]) in seen:
                continue
            seen.add((kind, chain[1]))
        count, size = found.get(kind, (0, 0))
        found[kind] = [count + 1, size + shape_bytes(shape)]
    return found


def estimated_seconds(text: str, clock_hertz: float) -> float | None:
    """The compiler's estimate of the seconds of one call of a program; None if it made none.

    The estimate is the sum of cycles over the instructions of the entry computation. It leaves out
    collectives, iterations of a loop after the first, and everything outside the device. XLA's
    other estimate, `optimal_seconds`, is no lower bound: for a matrix product on v6e it is three
    times the real time.

    Args:
        text: the HLO text of the compiled program.
        clock_hertz: the device's clock.
    """
    entry = text[text.index("\nENTRY "):]
    cycles = [int(number) for number in re.findall(r'"estimated_cycles":"(\d+)"', entry)]
    return sum(cycles) / clock_hertz if cycles else None


def _needed(error: str) -> int:
    """The bytes that a program needs, by the error with which the compiler refused it."""
    amount = re.search(r"(?:required[^()]*\(|Used )([\d.]+)([KMGT]?)", error)
    return int(float(amount[1]) * UNITS[amount[2]]) if amount else 0
