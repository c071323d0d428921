"""What a config will do, before it is run: its phases, how its updates are dealt, the totals.

    python -m bigbatch.plan --config=configs/cifar10.py:increase --devices=8

Needs neither an accelerator nor the data. `--format=json` prints the same for programs.
"""

import dataclasses
import json
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from absl import flags
from clu import parameter_overview
from ml_collections import ConfigDict

from bigbatch import command_line, network, schedule
from bigbatch.config import check, make_phases, make_recipe, make_seatings

command_line.define_config()
DEVICES = flags.DEFINE_integer("devices", 1, "How many devices share an update.", lower_bound=1)
FORMAT = flags.DEFINE_enum("format", "table", ["table", "json"], "What to print.")


def plan(config: ConfigDict, devices: int) -> dict[str, Any]:
    """Everything that is known of a run before it starts, ready for JSON.

    Args:
        config: see `config.base_config`.
        devices: how many share each update; changes how it is dealt and nothing that is learned.

    Returns:
        `phases` (the fields of `schedule.Phase`; `shift` in examples; `start_epoch`, `end_epoch`;
        and how an update is dealt: `ghost_batches`, `microbatches`, `seats` a device has in one
        pass, `idle_share`), `total_updates`, `total_examples`, `total_epochs`, `parameters`,
        `notes`, `constant_batch` (`batch_size` before any scale-up and the `updates` it would take
        if it never changed, as under "decay"), and of the config `strategy`, `train_examples`,
        `ghost_size` and `devices`.

    Raises:
        ValueError: for anything in the config that cannot be right.
    """
    check(config)
    phases = make_phases(config)
    n, last = config.data.train_examples, phases[-1]
    rows = [
        {
            **dataclasses.asdict(phase),
            "shift": phase.shift,
            "start_epoch": phase.start_example / n,
            "end_epoch": phase.end_example / n,
            "ghost_batches": seating.ghosts,
            "microbatches": seating.microbatches,
            "seats": seating.seats,
            "idle_share": seating.idle_share,
        }
        for phase, seating in zip(phases, make_seatings(config, phases, devices), strict=True)
    ]
    batch = config.recipe.batch_size
    return {
        "strategy": config.strategy,
        "train_examples": n,
        "ghost_size": config.ghost_size,
        "devices": devices,
        "phases": rows,
        "total_updates": sum(phase.updates for phase in phases),
        "total_examples": last.end_example,
        "total_epochs": last.end_example / n,
        "parameters": count_parameters(config),
        # With one batch size every phase ends on its multiples, so falls change no count.
        "constant_batch": {"batch_size": batch, "updates": -(-last.nominal_end_example // batch)},
        "notes": schedule.notes(make_recipe(config), phases),
    }


def count_parameters(config: ConfigDict) -> int:
    """Trainable numbers of the config's network; traces it and computes nothing."""
    with jax.enable_x64(config.dtype == "float64"):
        params, _ = jax.eval_shape(network.build(config).init, 0)
    return int(parameter_overview.count_parameters(params))


def as_text(planned: Mapping[str, Any]) -> str:
    """What `plan` returned, for a person: lines of up to 100 columns."""
    phases, constant = planned["phases"], planned["constant_batch"]
    updates = planned["total_updates"]
    schedule_rows = [
        [
            phase["index"], phase["name"],
            f"{phase['start_epoch']:.2f} to {phase['end_epoch']:.2f}",
            _grouped(phase["batch_size"]), _grouped(phase["updates"]), _rate(phase),
            f"{phase['momentum']:g}", f"{phase['noise_scale']:.4g}",
            f"{phase['noise_scale_approximate']:.4g}", f"{phase['lost_epochs']:.3g}",
        ]
        for phase in phases
    ]
    dealing_rows = [
        [
            phase["index"], _grouped(phase["start_example"]), _grouped(phase["end_example"]),
            _grouped(phase["shift"]), _grouped(phase["ghost_batches"]), phase["microbatches"],
            phase["seats"], f"{phase['idle_share']:.1%}" if phase["idle_share"] else "",
        ]
        for phase in phases
    ]
    paragraphs = [
        _table(
            ["", "phase", "epochs", "batch", "updates", "learning rate", "momentum", "noise scale",
             "approx.", "epochs lost"],
            schedule_rows,
        ),
        f"An update is dealt in ghost batches of {planned['ghost_size']} to {planned['devices']} "
        f"device{'s' * (planned['devices'] > 1)}; a seat takes one ghost batch in one pass.",
        _table(
            ["", "from example", "to example", "past nominal", "ghost batches", "passes",
             "seats a device", "idle seats"],
            dealing_rows,
        ),
        f"{_grouped(updates)} updates, {_grouped(planned['total_examples'])} examples, "
        f"{planned['total_epochs']:.2f} epochs of {_grouped(planned['train_examples'])}; "
        f"{_grouped(planned['parameters'])} parameters.",
    ]
    if updates < constant["updates"]:
        paragraphs.append(
            f"A constant batch of {constant['batch_size']} (the strategy decay) takes "
            f"{_grouped(constant['updates'])} updates: {constant['updates'] / updates:.3g} times "
            "as many."
        )
    paragraphs += [textwrap.fill(f"Note: {note}", 100) for note in planned["notes"]]
    return "\n\n".join(paragraphs)


def _rate(phase: Mapping[str, Any]) -> str:
    start, end = phase["learning_rate"], phase["learning_rate_end"]
    return f"{start:.4g}" if start == end else f"{start:.4g} to {end:.4g}"


def _grouped(number: int) -> str:
    """A whole number with its thousands apart: 80 000."""
    return f"{number:,}".replace(",", " ")


def _table(titles: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Columns as wide as their widest entry, to the right; a title breaks at its last space."""
    halves = [title.rpartition(" ") for title in titles]
    lines = [[half[0] for half in halves], [half[2] for half in halves],
             *([str(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.rjust, line, widths)).rstrip() for line in lines)


def main(arguments: Sequence[str]) -> None:
    """Prints the plan of the command line's config."""
    # A machine whose accelerators train something else can still plan.
    jax.config.update("jax_platforms", "cpu")
    planned = plan(command_line.config(), DEVICES.value)
    print(json.dumps(planned) if FORMAT.value == "json" else as_text(planned))


if __name__ == "__main__":
    command_line.run(main)
