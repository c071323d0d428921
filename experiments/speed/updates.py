"""What a run adds to the network within an update: microbatches, input with augmentation; and what
several updates in one program would save.
"""

import time
from functools import partial

import jax
from ml_collections import ConfigDict

from bigbatch.job.devices import compiler_options, make_mesh
from bigbatch.planning.compiled import memory_bytes
from bigbatch.update import update
from experiments.figures import load_config
from experiments.speed.bare import BareUpdate, describe, narrow, on_gpu
from experiments.speed.measure import Figure, paired, ratios
from experiments.speed.peers import wide_resnet_of

PASSES = 16
LOOPED = 10


def accumulation(repeats: int, short: bool) -> list[Figure]:
    """An update of 16 microbatches beside the one microbatch they repeat, and what it takes."""
    each = 512 if on_gpu() else 8 if short else 32

    def config(passes: int) -> ConfigDict:
        return wide_resnet_of(each * passes, each, short, *narrow(), f"microbatches={passes}")

    began, rows, compiling = time.perf_counter(), {}, {}
    for passes in (1, 2, PASSES):
        rows[passes] = BareUpdate(config(passes))
        compiling[passes] = time.perf_counter() - began
        began = time.perf_counter()
    seconds = paired(
        {"one": rows[1].takes(PASSES), "sixteen": rows[PASSES].take}, repeats)
    setting = f"{describe(config(1))}, {PASSES} microbatches of {each}"
    memory = {passes: max(map(memory_bytes, row.programs)) for passes, row in rows.items()}
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
    config = wide_resnet_of(batch, batch, short, *narrow())
    fed, fixed = BareUpdate(config), BareUpdate(config, augmented=False)
    updates = 4
    seconds = paired({"input": fed.takes(updates), "fixed": fixed.takes(updates)}, repeats)
    return [Figure(
        "resident input with augmentation beside fixed tensors",
        f"{describe(config)} update, batch {batch}", ">= 0.97", "x",
        ratios(seconds["fixed"], seconds["input"]), seconds=seconds)]


def several_a_dispatch(repeats: int, short: bool) -> list[Figure]:
    """The demo's updates in turn beside as many in a loop of one program, which no run makes.

    Raises:
        RuntimeError: if both do not come to the same loss.
    """
    config = load_config("configs/digits.py:decay")
    one, looped = BareUpdate(config), BareUpdate(config)
    mesh = make_mesh(jax.devices()[:1])
    # What was jitted: inside of another program it may bring no compiler options of its own.
    take_one = update.make_update(config, looped.net, mesh).update.__wrapped__

    def loop(state: update.State, *rest: jax.Array) -> tuple[update.State, update.Metrics]:
        return jax.lax.scan(lambda state, _: take_one(state, *rest), state, length=LOOPED)

    arguments = looped.resident, looped.batches[0], *looped.rates
    program = jax.jit(loop, donate_argnums=0, compiler_options=compiler_options(mesh)).lower(
        looped.state, *arguments).compile()

    def take_looped(programs: int) -> None:
        for _ in range(programs):
            looped.state, measured = program(looped.state, *arguments)
        jax.block_until_ready(looped.state)
        looped.loss = float(measured.loss[-1])

    one.take(LOOPED)
    take_looped(1)
    if abs(one.loss - looped.loss) > 1e-2 * one.loss:
        raise RuntimeError(f"losses: {one.loss} one by one, {looped.loss} in a loop.")
    times = 1 if short else 30
    seconds = paired({"one by one": one.takes(LOOPED * times),
                      "in a loop": partial(take_looped, times)}, repeats)
    return [Figure(
        f"several updates a dispatch: one by one beside {LOOPED} in a program's loop",
        f"configs/digits.py, updates of {config.recipe.batch_size}", "", "x",
        ratios(seconds["one by one"], seconds["in a loop"]), seconds=seconds)]
