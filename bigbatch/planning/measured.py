"""The noise scale that a run measured, at the epochs of a plan's phases."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bigbatch.mistake import Mistake
from bigbatch.schedule.smoothing import Smoothed
from bigbatch.storage import bucket
from bigbatch.storage.logs import read_events
from bigbatch.watching.log import NOISE_FACTOR

# The fields of both parts in metrics.jsonl: by all parameters where a run has it, or by the norms.
FIELDS = tuple((f"{name}_gradient_square", f"{name}_trace") for name in ("noise_full", "noise"))


def scales(workdir: str | Path, edges: Sequence[float]) -> list[float | None]:
    """The measured noise scale between epochs, in examples.

    Args:
        workdir: of a run of the same data, of any strategy, in a folder or a bucket.
        edges: epochs, ascending.

    Returns:
        One number between each two edges: the mean of both parts there, divided. None where nothing
        was measured, or |G|^2 is lost in its error.

    Raises:
        Mistake: if the run has measured no noise scale.
    """
    with bucket.opened(workdir) as (folder, mirror):
        if mirror:
            mirror.bring_down_logs()
        events = read_events(folder / "metrics.jsonl")
    fields = next((pair for pair in FIELDS if any(pair[0] in event for event in events)), None)
    if fields is None:
        raise Mistake(
            f"--measured_by={workdir}: there is no measured noise scale in a metrics.jsonl. A run "
            "has one if its network has GhostBatchNorm or the layers of "
            "bigbatch.models.layer_norms, or with --config.noise.every_epochs (docs/noise.md)."
        )
    found: list[float | None] = []
    for start, end in zip(edges, edges[1:], strict=False):
        parts = [[event[field] for field in fields] for event in events
                 if start < event["epoch"] <= end
                 and all(event.get(field) is not None for field in fields)]
        sums = [math.fsum(column) for column in zip(*parts, strict=True)] or [0.0, 0.0]
        found.append(Smoothed(*sums).scale)
    return found


def notes(phases: Sequence[Mapping[str, Any]]) -> list[str]:
    """Warnings of phases whose batch is far beyond the measured scale.

    Args:
        phases: of a plan, with `measured_scale`.
    """
    return [
        f"the batch of {phase['batch_size']} in phase {phase['name']} is over {NOISE_FACTOR} times "
        f"the measured noise scale there, {phase['measured_scale']:.3g} examples: an update of so "
        "many hardly learns more than one of fewer, so the curve is not that of a smaller batch."
        for phase in phases
        if phase["measured_scale"] and phase["batch_size"] > NOISE_FACTOR * phase["measured_scale"]
    ]
