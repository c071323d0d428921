"""What a plan says, as tables and sentences for the terminal."""

import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tabulate

from bigbatch.job import chips
from bigbatch.planning import compare
from bigbatch.watching.progress import format_seconds


def of_plan(planned: Mapping[str, Any]) -> str:
    """The result of `plan.plan` or `plan.plan_for_slices` as text and tables."""
    phases, constant = planned["phases"], planned["constant_batch"]
    updates, tokens = planned["total_updates"], planned["tokens_per_example"]
    noise_titles, noise_of = _noise_columns(planned["exchange"])
    measured = any(phase["measured_scale"] is not None for phase in phases)
    schedule_rows = [
        [
            phase["index"], phase["name"],
            f"{phase['start_epoch']:.2f} to {phase['end_epoch']:.2f}",
            *([_short(phase["end_example"] * tokens)] if tokens else []),
            _grouped(phase["batch_size"]), _grouped(phase["updates"]), _rate(phase),
            f"{phase['momentum']:g}", *noise_of(phase), *([_scale(phase)] if measured else []),
            f"{phase['lost_epochs']:.3g}",
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
             "learning rate", "momentum", *noise_titles,
             *(["measured scale"] if measured else []), "epochs lost"],
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
             *(("evaluation", row) for row in compiled["evaluations"]),
             *(("noise scale", row) for row in compiled["measurements"])]
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
    lines += [textwrap.fill(_state_sentence(name, sizes), 100)
              for name, sizes in compiled["states"].items() if sizes["parameters"] < sizes[""]]
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


def _state_sentence(name: str, sizes: Mapping[str, int]) -> str:
    """What a device holds of the state, by how it is split."""
    whole, optimizer, parameters = (f"{sizes[key] / chips.GIB:.3g} GiB"
                                    for key in ("", "optimizer", "parameters"))
    return (f"The state takes {whole} of each device of {name} if it is whole there, {optimizer} "
            f"with --config.sharding.optimizer=True and {parameters} with "
            "--config.sharding.parameters=True.")


def of_strategies(rows: Sequence[Mapping[str, Any]]) -> str:
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


def _scale(phase: Mapping[str, Any]) -> str:
    """The measured noise scale of a phase, in examples."""
    scale = phase["measured_scale"]
    return "" if scale is None else f"{scale:.3g}"


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
