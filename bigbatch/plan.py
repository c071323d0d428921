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
"""

import dataclasses
import json
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import tabulate
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
from bigbatch.job import chips, processes, statuses
from bigbatch.job.output import answer, say
from bigbatch.mistake import Mistake
from bigbatch.planning import compare, picture, topology
from bigbatch.storage import caches
from bigbatch.update import network, own_optimizer
from bigbatch.watching.progress import format_seconds

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
PICTURE = flags.DEFINE_string("picture", "", "File for a picture of rate, batch and noise.")
FORMAT = flags.DEFINE_enum("format", "table", ["table", "json"], "What to print.")


def plan(config: ConfigDict, devices: int | Sequence[int]) -> dict[str, Any]:
    """The phases of a config, the layout of their updates, and the totals, as JSON values.

    Args:
        config: see `config.base_config`.
        devices: how many devices share each update, in all phases or one number for each phase.
            They change the layout, and nothing that is learned.

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
        "notes": schedule.notes(recipe, phases, make_strategy(config), limits=make_limits(config)),
        "picture": picture.in_terminal(recipe, phases),
    }


def plan_for_slices(
    config: ConfigDict, topology_text: str, cache: str | None = None
) -> dict[str, Any]:
    """What `plan` returns for slices of Cloud TPU, and what compiling for them shows.

    Args:
        config: see `config.base_config`.
        topology_text: the slices; see `slices.parse`.
        cache: folder that keeps the results of compiling; "" for none, None for the usual one.

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
    return plan(config, [one.devices for one in chosen]) | {"compiled": slices.compile_for(
        config, phases, chosen, _cache_folder(cache), say)}


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


def as_text(planned: Mapping[str, Any]) -> str:
    """The result of `plan` or `plan_for_slices` as text and tables."""
    phases, constant = planned["phases"], planned["constant_batch"]
    updates, tokens = planned["total_updates"], planned["tokens_per_example"]
    noise_titles, noise_of = _noise_columns(planned["exchange"])
    schedule_rows = [
        [
            phase["index"], phase["name"],
            f"{phase['start_epoch']:.2f} to {phase['end_epoch']:.2f}",
            *([_short(phase["end_example"] * tokens)] if tokens else []),
            _grouped(phase["batch_size"]), _grouped(phase["updates"]), _rate(phase),
            f"{phase['momentum']:g}", *noise_of(phase), f"{phase['lost_epochs']:.3g}",
        ]
        for phase in phases
    ]
    layout_rows = [
        [
            phase["index"], _grouped(phase["start_example"]), _grouped(phase["end_example"]),
            _grouped(phase["shift"]), _grouped(phase["ghost_batches"]), phase["devices"],
            phase["microbatches"], phase["slots"],
            f"{phase['idle_share']:.1%}" if phase["idle_share"] else "",
        ]
        for phase in phases
    ]
    paragraphs = [
        _table(
            ["", "phase", "epochs", *(["to token"] if tokens else []), "batch", "updates",
             "learning rate", "momentum", *noise_titles, "epochs lost"],
            schedule_rows,
        ),
        planned["picture"],
        f"Each device takes some of an update's ghost batches of {planned['ghost_size']}; a slot "
        "is room for one in one pass.",
        _table(
            ["", "from example", "to example", "past nominal", "ghost batches", "devices", "passes",
             "slots a device", "padding slots"],
            layout_rows,
        ),
        *_idle_paragraph(phases),
        f"{_grouped(updates)} updates, {_grouped(planned['total_examples'])} examples, "
        f"{planned['total_epochs']:.2f} epochs of {_grouped(planned['train_examples'])}; "
        f"{_grouped(planned['parameters'])} parameters."
        + (f"\n{_short(planned['total_examples'] * tokens)} tokens, {_grouped(tokens)} an example."
           if tokens else ""),
    ]
    if updates < constant["updates"]:
        paragraphs.append(
            f"A constant batch of {_grouped(constant['batch_size'])} (the strategy decay) takes "
            f"{_grouped(constant['updates'])} updates: {constant['updates'] / updates:.3g} times "
            "as many."
        )
    saved = planned["saved"]
    if saved["at_most"] > 0 and planned["strategy"] == "increase" and saved["share"] > 0:
        paragraphs.append(textwrap.fill(
            f"Of {_grouped(saved['of'])} updates at a batch of {_grouped(saved['batch_size'])}, "
            "batches that followed the rate without limits and rounding would save "
            f"{saved['at_most']:.1%}; these save {saved['share']:.1%}.", 100))
    paragraphs += [_note(text) for text in planned["notes"]]
    if "compiled" in planned:
        paragraphs += _compiled_paragraphs(planned["compiled"])
    return "\n\n".join(paragraphs)


def _idle_paragraph(phases: Sequence[Mapping[str, Any]]) -> list[str]:
    """The largest numbers of devices without padding slots; [] if no phase has padding slots."""
    idle = [phase for phase in phases if phase["idle_share"]]
    if not idle:
        return []
    fills = "; ".join(
        f"phase {phase['index']} fills {_grouped(phase['fills_devices'])}" for phase in idle)
    least = min(phase["fills_devices"] for phase in phases)
    conclusion = f"so the largest slice that is never idle has {_grouped(least)}" if least else (
        "so every number of devices has padding slots with this max_per_device_batch")
    return [textwrap.fill(f"Of 1, 2, 4, 8, ... devices, {fills}; {conclusion}.", 100)]


def _compiled_paragraphs(compiled: Mapping[str, Any]) -> list[str]:
    """The result of `slices.compile_for` as text and a table."""
    named = [*((str(index), row) for index, row in enumerate(compiled["phases"])),
             *(("evaluation", row) for row in compiled["evaluations"])]
    rows = [
        [
            name, row["slice"], row["devices"], f"{row['compile_seconds']:.0f}",
            *(f"{row[key] / chips.GIB:.2f}" for key in ("memory_bytes", "memory_limit_bytes")),
            f"{row['flops'] / 1e12:.3g}",
            *(sum(pair[at] for pair in row["collectives"].values()) / scale
              for at, scale in ((0, 1), (1, 1e6))),
            "" if row["seconds"] is None else f"{1000 * row['seconds']:.4g}",
            "" if row["fits"] else "no",
        ]
        for name, row in named
    ]
    for row in rows:
        row[7:9] = f"{row[7]:.0f}", f"{row[8]:.4g}" if row[8] >= 0.001 else "<0.001"
    lines = [
        "Compiled for each slice, of one update or evaluation on one device (times are estimates):",
        _table(["", "slice", "devices", "compile s", "memory GiB", "of GiB", "Tflop", "collectives",
                "MB reduced", "about ms", "fits"], rows),
    ]
    lines += [textwrap.fill(f"{name} does not fit on {row['slice']}: {row['advice']}.", 100)
              for name, row in named if not row["fits"]]
    if kernels := [f"{name} {row['kernels']} and {row['accessed_bytes'] / 1e9:.3g} GB"
                   for name, row in named if row["kernels"]]:
        lines.append(textwrap.fill(
            f"Kernels, and what they read and write: {', '.join(kernels)}. No GPU was there to try "
            "algorithms on, and times are the least that memory or matrix units allow; real ones "
            "are several times as long.", 100))
    seconds = compiled["seconds_at_least"]
    if seconds is not None and compiled["fits"]:
        lines.append(textwrap.fill(
            f"By the compiler's own estimates the run takes {format_seconds(seconds)} or "
            f"more, {compiled['chip_hours_at_least']:.3g} chip-hours. A lower bound: without "
            "reductions between chips, input, saves and compiling.", 100))
    return lines


def compared_as_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """The result of `compare.compare` as a table and sentences."""
    on_slices = any(row["slice"] for row in rows)
    table = []
    for row in rows:
        cells = [row["strategy"], _grouped(row["updates"])]
        if on_slices:
            cells += [row["slice"], *(
                ("does not fit" if row["fits"] is False else "not known", "")
                if row["seconds"] is None
                else (format_seconds(row["seconds"]), f"{row['chip_hours']:.3g}")
            ), "*" if row["unbeaten"] else ""]
        table.append(cells)
    titles = ["strategy", "updates", *(
        ["slice", "time, at least", "chip- hours", "unbeaten"] if on_slices else [])]
    paragraphs = [_table(titles, table)]
    if on_slices:
        paragraphs.append(
            "Times are the compiler's estimates, without reductions between chips, input, saves "
            "and compiling.\n* No other row takes at most as much time and as many chip-hours.")
    return "\n\n".join([*paragraphs, *compare.where_fewer_updates_are_no_gain(rows)])


def _noise_columns(exchange: str) -> tuple[list[str], Callable[[Mapping[str, Any]], list[str]]]:
    """The titles and the entries of the columns of a phase's noise, as its exchange has it."""
    if exchange == "linear":
        return ["noise scale", "approx."], lambda phase: [
            f"{phase[key]:.4g}" for key in ("noise_scale", "noise_scale_approximate")]
    if exchange == "none":
        return [], lambda phase: []
    return ["noise, of peak's"], lambda phase: [f"{phase['noise']:.4g}"]


def _rate(phase: Mapping[str, Any]) -> str:
    start, end = phase["learning_rate"], phase["learning_rate_end"]
    return f"{start:.4g}" if start == end else f"{start:.4g} to {end:.4g}"


def _short(tokens: int) -> str:
    """A number of tokens in four digits: 512, 2.5e9."""
    return f"{tokens:.4g}".replace("e+0", "e").replace("e+", "e")


def _grouped(number: int) -> str:
    """A whole number with a space between thousands: 80 000."""
    return f"{number:,}".replace(",", " ")


def _note(text: str) -> str:
    """A note with its whole numbers `_grouped`, and no line that ends inside of one."""
    grouped = re.sub(r"(?<![\w./])\d{4,}(?![\w./]\d)",
                     lambda number: _grouped(int(number[0])).replace(" ", "\xa0"), text)
    return textwrap.fill(f"Note: {grouped}", 100).replace("\xa0", " ")


def _table(titles: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table with entries flush right, and each title on two lines, broken at its last space."""
    halves = [title.rpartition(" ") for title in titles]
    text = tabulate.tabulate(
        [[half[0] for half in halves], [half[2] for half in halves], *rows], tablefmt="plain",
        disable_numparse=True, stralign="right")
    return "\n".join(map(str.rstrip, text.split("\n")))


def main(arguments: Sequence[str]) -> None:
    """Prints the plan of the config that the command line names."""
    topology.compile_elsewhere()
    config = command_line.config()
    if TOPOLOGY.value and DEVICES.value:
        raise Mistake(
            f"--topology={TOPOLOGY.value} and --devices={DEVICES.value}: a slice has its own "
            "number of devices; give only one of the two."
        )
    for flag, given in (("picture", PICTURE.value), ("devices", DEVICES.value)):
        if COMPARE.value and given:
            raise Mistake(f"--compare and --{flag}={given}: --{flag} is of one strategy, whose "
                          "plan is shown without --compare.")
    if COMPARE.value:
        found = sorted(map(topology.parse, filter(None, TOPOLOGY.value.split(","))),
                       key=lambda one: one.devices)
        rows = compare.compare(
            config, COMPARE.value, found, _cache_folder(CACHE.value), say)
        answer(json.dumps(rows) if FORMAT.value == "json" else compared_as_text(rows))
        return
    if PICTURE.value:
        check(config)
        picture.draw(Path(PICTURE.value), f"{config.strategy}, {config.recipe.curve}",
                     make_recipe(config), make_phases(config))
    if TOPOLOGY.value:
        planned = plan_for_slices(config, TOPOLOGY.value, CACHE.value)
    else:
        planned = plan(config, DEVICES.value or 1)
    answer(json.dumps(planned) if FORMAT.value == "json" else as_text(planned))
    if TOPOLOGY.value and not planned["compiled"]["fits"]:
        processes.leave(statuses.FAILED)


if __name__ == "__main__":
    command_line.run(main)
