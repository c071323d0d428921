"""The cost of microbatches and of augmented input in an update, and of dispatching each update."""

import time
from collections.abc import Callable
from functools import partial

import jax
from ml_collections import ConfigDict

from bigbatch.planning.compiled import memory_bytes
from experiments.figures import load_config
from experiments.speed.bare import BareUpdate, describe, narrow, on_gpu
from experiments.speed.measure import Measurement, beside, check_same_loss
from experiments.speed.peers import wide_resnet_of

PASSES = 16
LOOPED = 10


def accumulation(repeats: int, short: bool) -> list[Measurement]:
    """An update of 16 microbatches beside 16 updates of one: time, memory and compiling."""
    each = 512 if on_gpu() else 8 if short else 32

    def config(passes: int) -> ConfigDict:
        return wide_resnet_of(each * passes, each, short, *narrow(), f"microbatches={passes}")

    began, rows, compiling = time.perf_counter(), {}, {}
    for passes in (1, 2, PASSES):
        rows[passes] = BareUpdate(config(passes))
        compiling[passes] = time.perf_counter() - began
        began = time.perf_counter()
    setting = f"{describe(config(1))}, {PASSES} microbatches of {each}"
    memory = {passes: max(map(memory_bytes, row.programs)) for passes, row in rows.items()}
    return [
        beside("accumulation, per example", f"{setting} beside 16 updates of one", ">= 0.95",
               {"one": partial(rows[1].take, PASSES), "sixteen": rows[PASSES].take}, repeats),
        Measurement("accumulation, device memory", f"{setting} beside 2 microbatches", "<= 1.0",
                    "x", [round(memory[PASSES] / memory[2], 4)]),
        Measurement("accumulation, compile time", f"{setting} beside 2 microbatches", "flat",
                    "x", [round(compiling[PASSES] / compiling[2], 4)]),
    ]


def resident_input(repeats: int, short: bool) -> list[Measurement]:
    """An update with its input (uint8 on the device, gathered, augmented) beside one of floats."""
    batch = 1024 if on_gpu() else 16 if short else 64
    config = wide_resnet_of(batch, batch, short, *narrow())
    fed, fixed = BareUpdate(config), BareUpdate(config, augmented=False)
    return [beside(
        "resident input with augmentation beside fixed tensors",
        f"{describe(config)} update, batch {batch}", ">= 0.97",
        {"fixed": partial(fixed.take, 4), "input": partial(fed.take, 4)}, repeats)]


def several_a_dispatch(repeats: int, short: bool) -> list[Measurement]:
    """The demo's updates in turn beside as many in a loop of one program, which no run makes."""
    config = load_config("configs/digits.py:decay")
    one, looped = BareUpdate(config), BareUpdate(config)
    arguments = looped.resident, looped.batches[0], looped.rates

    def loop(update: Callable) -> Callable:
        return lambda state, *rest: jax.lax.scan(
            lambda state, _: update(state, *rest), state, length=LOOPED)

    program = looped.compile_with(loop, looped.state, *arguments)

    def take_looped(programs: int) -> None:
        for _ in range(programs):
            looped.state, measured = program(looped.state, *arguments)
        jax.block_until_ready(looped.state)
        looped.loss = float(measured.loss[-1])

    one.take(LOOPED)
    take_looped(1)
    check_same_loss(looped.loss, one.loss, 1e-2)
    times = 1 if short else 30
    return [beside(
        f"several updates a dispatch: one by one beside {LOOPED} in a program's loop",
        f"configs/digits.py, updates of {config.recipe.batch_size}", "",
        {"one by one": partial(one.take, LOOPED * times), "in a loop": partial(take_looped, times)},
        repeats)]
