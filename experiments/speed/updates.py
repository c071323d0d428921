"""What a run adds to the network within an update: microbatches, input with augmentation."""

import time

from ml_collections import ConfigDict

from experiments.speed.bare import BareUpdate
from experiments.speed.measure import Figure, paired, ratios
from experiments.speed.peers import on_gpu, wide_resnet_config

PASSES = 16


def accumulation(repeats: int, short: bool) -> list[Figure]:
    """An update of 16 microbatches beside the one microbatch they repeat, and what it takes."""
    each = 512 if on_gpu() else 8 if short else 32
    narrow = () if on_gpu() else ("model.width=1",)

    def config(passes: int) -> ConfigDict:
        return wide_resnet_config(each * passes, each, short, *narrow, f"microbatches={passes}")

    began, rows, compiling = time.perf_counter(), {}, {}
    for passes in (1, 2, PASSES):
        rows[passes] = BareUpdate(config(passes))
        compiling[passes] = time.perf_counter() - began
        began = time.perf_counter()
    seconds = paired(
        {"one": rows[1].takes(PASSES), "sixteen": rows[PASSES].take}, repeats)
    setting = f"WRN-16-{'4' if on_gpu() else '1'}, {PASSES} microbatches of {each}"
    memory = {passes: max(map(_memory, row.programs)) for passes, row in rows.items()}
    return [
        Figure("accumulation, per example", f"{setting} beside 16 updates of one", ">= 0.95", "x",
               ratios(seconds["one"], seconds["sixteen"]), seconds=seconds),
        Figure("accumulation, device memory", f"{setting} beside 2 microbatches", "<= 1.0", "x",
               [round(memory[PASSES] / memory[2], 4)]),
        Figure("accumulation, compile time", f"{setting} beside 2 microbatches", "flat", "x",
               [round(compiling[PASSES] / compiling[2], 4)]),
    ]


def resident_input(repeats: int, short: bool) -> list[Figure]:
    """The update with its input (uint8 on the device, gathered, augmented) beside fixed floats."""
    batch = 1024 if on_gpu() else 16 if short else 64
    narrow = () if on_gpu() else ("model.width=1",)
    config = wide_resnet_config(batch, batch, short, *narrow)
    fed, fixed = BareUpdate(config), BareUpdate(config, augmented=False)
    updates = 4
    seconds = paired({"input": fed.takes(updates), "fixed": fixed.takes(updates)}, repeats)
    return [Figure(
        "resident input with augmentation beside fixed tensors",
        f"WRN-16-{'4' if on_gpu() else '1'} update, batch {batch}", ">= 0.97", "x",
        ratios(seconds["fixed"], seconds["input"]), seconds=seconds)]


def _memory(program: object) -> int:
    """Bytes a device needs while a program runs."""
    known = program.memory_analysis()
    return (known.argument_size_in_bytes + known.output_size_in_bytes - known.alias_size_in_bytes
            + known.temp_size_in_bytes)
