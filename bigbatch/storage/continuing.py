"""Whether a run may go on under a config that is not the one it was saved with.

What would have made the examples seen so far train differently is refused, with both values side
by side. What cannot (logging, devices, microbatches) and what changes only examples not yet seen
(more epochs, a later fall) is allowed.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from bigbatch import __version__
from bigbatch.config import saved_config
from bigbatch.schedule import Phase

# Never change what is learned.
FREE = (
    "max_per_device_batch", "microbatches", "eval_batch_size", "log_every_epochs",
    "eval_every_epochs", "checkpoint_every_epochs", "keep_checkpoints", "tensorboard", "data.dir",
    "data.workers", "data.read_threads",
    "data.on_bad_image",  # what is found bad from now on; that it was not before is settled
)
# Change it through the phases alone, which are compared themselves.
THROUGH_PHASES = ("recipe", "strategy", "hybrid_falls", "scale_up", "limits")


class Position(NamedTuple):
    """How far a run is."""

    examples_seen: int = 0
    updates: int = 0
    # The line of metrics.jsonl of the last update, where the run was stopped inside the evaluation
    # after it: the next start evaluates first, then writes this line.
    pending_evaluation: dict[str, Any] | None = None


def position_of(run: Mapping[str, Any]) -> Position:
    """The position `describe_run` recorded; the start where there is no record."""
    if not run:
        return Position()
    pending = run.get("pending_evaluation", run.get("owed"))  # as version 0.1 called it
    if pending is not None:
        pending = {key: value for key, value in pending.items() if key != "evaluate"}
    return Position(run["examples_seen"], run["updates"], pending)


def describe_run(config: ConfigDict, phases: Sequence[Phase], at: Position) -> dict[str, Any]:
    """What a checkpoint records of the run it belongs to, ready for JSON."""
    return {
        **at._asdict(),
        "version": __version__,
        "config": json.loads(config.to_json()),
        "phases": [dataclasses.asdict(phase) for phase in phases],
    }


def changes(
    saved: Mapping[str, Any], config: ConfigDict, phases: Sequence[Phase]
) -> tuple[list[str], list[str]]:
    """What differs from a saved run: (what forbids to continue, what is worth a line in the log).

    Args:
        saved: as `describe_run` made it.
        config: of now.
        phases: of now.
    """
    before = flatten(json.loads(saved_config(saved).to_json()))
    now = flatten(json.loads(config.to_json()))
    refused, allowed = [], []
    for key in sorted(before.keys() | now.keys()):
        old, new = (flat[key] if key in flat else "(absent)" for flat in (before, now))
        if old != new:
            text = f"{key}: {old!r} saved, {new!r} now"
            free = any(key == name or key.startswith(name + ".") for name in FREE + THROUGH_PHASES)
            (allowed if free else refused).append(text)
    refused += _phase_changes(saved["phases"], phases, saved["examples_seen"])
    return refused, allowed


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as {dotted key: value}."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def _phase_changes(
    saved: Sequence[Mapping[str, Any]], phases: Sequence[Phase], examples_seen: int
) -> list[str]:
    """Where the phases differ before `examples_seen`."""
    def seen(phases: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        rows = []
        for phase in phases:
            if phase["start_example"] >= examples_seen:
                break
            row = {key: phase[key] for key in (
                "start_example", "batch_size", "learning_rate", "momentum"
            )}
            # A phase that is not over may end elsewhere, but its updates must have been these.
            row["end_example"] = min(phase["end_example"], examples_seen)
            if phase["learning_rate"] != phase["learning_rate_end"]:
                row["learning_rate_end"] = phase["learning_rate_end"]
                row["nominal_end_example"] = phase["nominal_end_example"]
            rows.append(row)
        return rows

    old, new = seen(saved), seen([dataclasses.asdict(phase) for phase in phases])
    differing = [
        f"phase {index}: {before} saved, {after} now"
        for index, (before, after) in enumerate(zip(old, new, strict=False)) if before != after
    ]
    if len(old) != len(new):
        differing.append(
            f"phases before example {examples_seen}: {len(old)} saved, {len(new)} now"
        )
    return differing
