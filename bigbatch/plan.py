"""Prints what a config will do: its phases, the layout of its updates, and the totals.

    python -m bigbatch.plan --config=cifar10.py:increase --devices=8

or, where the package is installed, `bigbatch-plan` in the place of `python -m bigbatch.plan`.
Neither an accelerator nor the data are needed. `--format=json` prints the same as JSON.

    python -m bigbatch.plan --config=imagenet_resnet50.py --topology=v2-256,noise/10=v2-512

also compiles every program with the TPU compiler (`make .tpu/installed`), on a machine without a
TPU: here for a slice of 256 cores, and from the phase noise/10 on for one of 512. The exit status
is 1 if a program does not fit into a device's memory.

    python -m bigbatch.plan --config=imagenet_resnet50.py --compare=decay,increase \\
        --topology=v5litepod-16,v5litepod-64

sets strategies beside each other: on each slice, and on one that grows with the batch.

    python -m bigbatch.plan --config=cifar10.py:increase --measured_by=RUN

shows, beside each phase's batch, the noise scale that a run has measured at the same epochs.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags
from clu import parameter_overview
from ml_collections import ConfigDict

from bigbatch import command_line, schedule
from bigbatch.config import (
    check,
    make_layouts,
    make_limits,
    make_phases,
    make_recipe,
    make_strategy,
    tokens_per_example,
)
from bigbatch.job import processes, statuses
from bigbatch.job.output import answer, say
from bigbatch.mistake import Mistake
from bigbatch.planning import compare, measured, picture, tables, topology
from bigbatch.storage import caches
from bigbatch.update import network, own_optimizer

command_line.define_config()
DEVICES = flags.DEFINE_integer("devices", None, "How many devices share an update.", lower_bound=1)
TOPOLOGY = flags.DEFINE_string(
    "topology", "", "Slice to compile for: v2-256 or v2:8x16; SLICE,PHASE=SLICE,... to change it."
)
CACHE = flags.DEFINE_string(
    "plan_cache", None, "Folder that keeps the results of compiling; empty for none. Without the "
    f"flag: bigbatch/plans in ${caches.VARIABLE} (~/.cache)."
)
COMPARE = flags.DEFINE_list(
    "compare", [], "Strategies to set beside each other; --topology then lists slices."
)
MEASURED_BY = flags.DEFINE_string(
    "measured_by", "", "Workdir of a run of the same data, whose noise scale the plan shows too."
)
PICTURE = flags.DEFINE_string("picture", "", "File for a picture of rate, batch and noise.")
FORMAT = flags.DEFINE_enum("format", "table", ["table", "json"], "What to print.")


def plan(
    config: ConfigDict, devices: int | Sequence[int], measured_by: str | Path = ""
) -> dict[str, Any]:
    """The phases of a config, the layout of their updates, and the totals, as JSON values.

    Args:
        config: see `config.base_config`.
        devices: how many devices share each update, in all phases or one number for each phase.
            They change the layout, and nothing that is learned.
        measured_by: the workdir of a run, see `measured.scales`; "" for none.

    Returns:
        `strategy`, `train_examples` and `ghost_size` of the config; `total_updates`,
        `total_examples`, `total_epochs`, `tokens_per_example` (None if the task has no tokens);
        `parameters`, the number of trainable ones; `notes`;
        `picture`, of rate, batch and noise as text;
        `constant_batch`, with the `batch_size` before any scale-up and the `updates` that a run
        takes if this size never changes, as with the strategy "decay"; `saved`, with the share of
        the updates (`of` this many, at the `batch_size` after any scale-up) that the batches save
        and the share that an increase without limits, rounding and ramp saves `at_most`;
        `exchange`; and `phases`, each with the fields of `schedule.Phase` (its noise scale is that
        of SGD), its `noise` relative to the recipe's at its peak (None with the exchange "none"),
        the `measured_scale` of the run `measured_by` (examples; None where that is not known),
        its `shift` (examples), `start_epoch`, `end_epoch`, and the
        layout of its updates: `devices`, `ghost_batches`, `microbatches`, `slots` (of a device in
        one pass), `idle_share` (of padding slots), and `fills_devices`, the largest power of 2 of
        devices without padding slots.

    Raises:
        Mistake: if a value in the config is not allowed.
    """
    check(config)
    phases, recipe = make_phases(config), make_recipe(config)
    n, last = config.data.train_examples, phases[-1]
    counts = [devices] * len(phases) if isinstance(devices, int) else devices
    rows = [
        {
            **dataclasses.asdict(phase),
            "shift": phase.shift,
            "noise": schedule.noise(recipe, phase.learning_rate, phase.batch_size),
            "start_epoch": phase.start_example / n,
            "end_epoch": phase.end_example / n,
            "devices": layout.devices,
            "ghost_batches": layout.ghosts,
            "microbatches": layout.microbatches,
            "slots": layout.slots,
            "idle_share": layout.idle_share,
            "fills_devices": _fills_devices(config, phase),
        }
        for phase, count in zip(phases, counts, strict=True)
        for layout in make_layouts(config, [phase], count)
    ]
    known = measured.scales(measured_by, [0.0, *(row["end_epoch"] for row in rows)]) if (
        measured_by) else [None] * len(rows)
    for row, scale in zip(rows, known, strict=True):
        row["measured_scale"] = scale
    batch, updates = config.recipe.batch_size, sum(phase.updates for phase in phases)
    return {
        "strategy": config.strategy,
        "exchange": recipe.exchange,
        "train_examples": n,
        "ghost_size": config.ghost_size,
        "phases": rows,
        "total_updates": updates,
        "total_examples": last.end_example,
        "total_epochs": last.end_example / n,
        "tokens_per_example": tokens_per_example(config),
        "parameters": count_parameters(config),
        # With one batch size every phase ends on a multiple of it, so falls change no count.
        "constant_batch": {"batch_size": batch, "updates": -(-last.nominal_end_example // batch)},
        "saved": {
            "at_most": schedule.ceiling(recipe),
            "of": -(-last.nominal_end_example // recipe.batch_size),
            "batch_size": recipe.batch_size,
            "share": 1 - updates * recipe.batch_size / last.nominal_end_example,
        },
        "notes": schedule.notes(recipe, phases, make_strategy(config), limits=make_limits(config))
        + measured.notes(rows),
        "picture": picture.in_terminal(recipe, phases),
    }


def plan_for_slices(
    config: ConfigDict, topology_text: str, cache: str | None = None, measured_by: str | Path = ""
) -> dict[str, Any]:
    """What `plan` returns for slices of Cloud TPU, and what compiling for them shows.

    Args:
        config: see `config.base_config`.
        topology_text: the slices; see `slices.parse`.
        cache: folder that keeps the results of compiling; "" for none, None for the usual one.
        measured_by: see `plan`.

    Returns:
        What `plan` returns, and `compiled`: see `slices.compile_for`.

    Raises:
        Mistake: if a value in the config or the text is not allowed, or the TPU compiler is not
            installed.
    """
    # Imported here, as its imports take seconds.
    from bigbatch.planning import slices

    check(config)
    phases = make_phases(config)
    chosen = slices.parse(topology_text, phases)
    planned = plan(config, [one.devices for one in chosen], measured_by)
    return planned | {
        "compiled": slices.compile_for(config, phases, chosen, _cache_folder(cache), say)}


def _cache_folder(named: str | None) -> Path | None:
    """The folder that --plan_cache names: None without the flag, "" for none."""
    cache = caches.folder("plans") if named is None else named
    return Path(cache).expanduser() if cache else None


def _fills_devices(config: ConfigDict, phase: schedule.Phase) -> int:
    """The largest power of 2 of devices on which `phase` has no padding slot; 0 if none."""
    devices = 1 << ((phase.batch_size // config.ghost_size).bit_length() - 1)
    while devices and make_layouts(config, [phase], devices)[0].idle_share:
        devices //= 2
    return devices


def count_parameters(config: ConfigDict) -> int:
    """The number of trainable parameters of the config's network, which is only traced.

    Raises:
        Mistake: if the network, or an optimizer of the user's own for it, is wrong.
    """
    with jax.enable_x64(config.dtype == "float64"):
        params = network.build(config).params
        own_optimizer.check(config, params)
    return int(parameter_overview.count_parameters(params))


def main(arguments: Sequence[str]) -> None:
    """Prints the plan of the config that the command line names."""
    topology.compile_elsewhere()
    config = command_line.config()
    if TOPOLOGY.value and DEVICES.value:
        raise Mistake(
            f"--topology={TOPOLOGY.value} and --devices={DEVICES.value}: a slice has its own "
            "number of devices; give only one of the two."
        )
    for flag, given in (("picture", PICTURE.value), ("devices", DEVICES.value),
                        ("measured_by", MEASURED_BY.value)):
        if COMPARE.value and given:
            raise Mistake(f"--compare and --{flag}={given}: --{flag} is of one strategy, whose "
                          "plan is shown without --compare.")
    if COMPARE.value:
        found = sorted(map(topology.parse, filter(None, TOPOLOGY.value.split(","))),
                       key=lambda one: one.devices)
        rows = compare.compare(
            config, COMPARE.value, found, _cache_folder(CACHE.value), say)
        answer(json.dumps(rows) if FORMAT.value == "json" else tables.of_strategies(rows))
        return
    if PICTURE.value:
        check(config)
        picture.draw(Path(PICTURE.value), f"{config.strategy}, {config.recipe.curve}",
                     make_recipe(config), make_phases(config))
    if TOPOLOGY.value:
        planned = plan_for_slices(config, TOPOLOGY.value, CACHE.value, MEASURED_BY.value)
    else:
        planned = plan(config, DEVICES.value or 1, MEASURED_BY.value)
    answer(json.dumps(planned) if FORMAT.value == "json" else tables.of_plan(planned))
    if TOPOLOGY.value and not planned["compiled"]["fits"]:
        processes.leave(statuses.FAILED)


if __name__ == "__main__":
    command_line.run(main)
