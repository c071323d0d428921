"""The kernels of a program that was compiled for a GPU, the bytes they move, and their least time.

They are read in the text of the compiled HLO, in which each instruction that computes is one kernel
or one call of a library.
"""

import math
import re
from collections.abc import Sequence

from bigbatch.job.chips import Gpu

# What only names, orders or waits for what others compute.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all",
        "partition-id", "replica-id", "opt-barrier", "add-dependency"}
LEAST_SECONDS = 1e-6  # of a kernel, however little it does
INSTRUCTION = re.compile(r"\s*(?:ROOT )?(%[\w.\-]+) = (.*?) ([\w\-]+)\((.*?)\)(?:,|$)")


def least_seconds(kernels: Sequence[int], kind: Gpu, flops: float) -> float:
    """No call of a program takes less: by its memory and launches, or by its matrix units.

    Args:
        kernels: the bytes that each moves.
        kind: of the GPU.
        flops: of the program, counted at the peak in bfloat16.
    """
    moving = sum(max(size / kind.bytes_a_second, LEAST_SECONDS) for size in kernels)
    return max(moving, flops / kind.peak_flops)


def kernels(text: str) -> list[int]:
    """The bytes that each kernel reads and writes, each of its arrays once.

    Of a loop, the first iteration alone is counted.

    Args:
        text: the HLO text of a program that was compiled for a GPU.
    """
    bodies = {}
    for name, body in re.findall(r"(?m)^(?:ENTRY )?(%[\w.\-]+) \(.*\{\n((?:.+\n)*?)\}", text):
        bodies[name] = body.splitlines()
    entry = re.search(r"(?m)^ENTRY (%[\w.\-]+)", text)[1]
    sizes: dict[str, int] = {}
    moved = []
    for line in bodies[entry]:
        if not (found := INSTRUCTION.match(line)):
            continue
        name, shape, operation, arguments = found.groups()
        sizes[name] = shape_bytes(shape)
        if operation in FREE or operation.endswith("-done"):
            continue
        operands = re.findall(r"%[\w.\-]+", arguments)
        called = re.search(r"calls=(%[\w.\-]+)", line)
        rows = _taken(bodies[called[1]]) if called else {}
        moved.append(sizes[name] + sum(
            rows.get(at, sizes.get(operand, 0)) for at, operand in enumerate(operands)))
    return moved


def _taken(body: list[str]) -> dict[int, int]:
    """Of a fusion, {operand: bytes} for those of which it only takes a part."""
    numbers, taken, whole = {}, {}, set()
    for line in body:
        if not (found := INSTRUCTION.match(line)):
            continue
        name, shape, operation, arguments = found.groups()
        if operation == "parameter":
            numbers[name] = int(arguments)
            continue
        for at, operand in enumerate(re.findall(r"%[\w.\-]+", arguments)):
            if operation in ("gather", "dynamic-slice", "slice") and at == 0:
                taken[operand] = taken.get(operand, 0) + shape_bytes(shape)
            else:
                whole.add(operand)
    return {numbers[name]: size for name, size in taken.items()
            if name in numbers and name not in whole}


def shape_bytes(shape: str) -> int:
    """The bytes of a shape in HLO text, such as f32[8,128]{1,0}, or of a tuple of shapes."""
    arrays = re.findall(r"\b(pred|bf16|[suf]\d+)\w*\[([\d,]*)\]", shape)
    return sum(
        math.prod(map(int, filter(None, sides.split(","))))
        * max(1, int(re.sub(r"\D", "", kind) or 8) // 8)
        for kind, sides in arrays
    )
