"""Sets the strategies of a config beside each other, on slices that are not there.

Fewer updates are less time only where the devices take a larger batch as quickly for each example,
or where there are more devices. What the TPU compiler says of every update answers it.
"""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from bigbatch.config import check, make_phases
from bigbatch.mistake import Mistake
from bigbatch.planning import topology
from bigbatch.schedule import STRATEGIES, Phase

NOT_LESS = 0.97  # of the time of the strategy with the most updates


def compare(
    config: ConfigDict, strategies: Sequence[str], found: Sequence[topology.Slice],
    folder: Path | None = None, show: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """What each strategy takes on each slice.

    Args:
        config: see `config.base_config`; its strategy is replaced.
        strategies: the names.
        found: the slices, from small to large; [] compares the updates only. If there are several,
            a slice that grows with the batch is also tried: see `growing`.
        folder: see `compiled.measure`.
        show: see `slices.compile_for`.

    Returns:
        For each strategy and slice: `strategy`, `slice`, `updates`, `seconds` and `chip_hours` (by
        the compiler's estimates, lower bounds; None without a slice, where the compiler made none,
        or where it does not fit), `fits`, and `unbeaten`: whether no other row takes at most as
        much of both.

    Raises:
        Mistake: if a strategy is unknown or has no schedule, or the compiler is not installed.
    """
    # Imported here, as its imports take seconds and a plan without slices does not need them.
    from bigbatch.planning import slices

    rows = []
    for name in strategies:
        if name not in STRATEGIES:
            raise Mistake(f"--compare names {name!r}; allowed are {', '.join(STRATEGIES)}.")
        own = config.copy_and_resolve_references()
        own.strategy = name
        check(own)
        phases = make_phases(own)
        choices = {one.name: [one] * len(phases) for one in found}
        if len(found) > 1:
            grown = growing(phases, found)
            choices.setdefault(" then ".join(dict.fromkeys(one.name for one in grown)), grown)
        for slice_name, chosen in (choices or {"": []}).items():
            told = slices.compile_for(own, phases, chosen, folder, show) if chosen else None
            counts = bool(told and told["fits"])
            rows.append({
                "strategy": name, "slice": slice_name,
                "updates": sum(phase.updates for phase in phases),
                "seconds": told["seconds_at_least"] if counts else None,
                "chip_hours": told["chip_hours_at_least"] if counts else None,
                "fits": told["fits"] if told else None,
            })
    for row in rows:
        row["unbeaten"] = row["seconds"] is not None and not any(
            _beats(other, row) for other in rows)
    return rows


def growing(phases: Sequence[Phase], found: Sequence[topology.Slice]) -> list[topology.Slice]:
    """The slice of each phase where slices grow with the batch.

    A phase takes the largest slice on which each device has at least as many examples of an update
    as in the first phase on the first slice.
    """
    first = found[0]
    each = phases[0].batch_size / first.devices
    return [max((one for one in found if phase.batch_size / one.devices >= each),
                key=lambda one: one.devices, default=first) for phase in phases]


def _beats(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    if one["seconds"] is None:
        return False
    pairs = [(one[key], other[key]) for key in ("seconds", "chip_hours")]
    return all(mine <= its for mine, its in pairs) and any(mine < its for mine, its in pairs)


def where_fewer_updates_are_no_gain(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Sentences on rows with fewer updates, but hardly less time, than another on the same slice.

    Args:
        rows: what `compare` returns.
    """
    said = []
    for row in rows:
        same = [other for other in rows
                if other["slice"] == row["slice"] and other["seconds"] is not None]
        if row["seconds"] is None or not same:
            continue
        most = max(same, key=lambda other: other["updates"])
        if row["updates"] < most["updates"] and row["seconds"] >= NOT_LESS * most["seconds"]:
            said.append(textwrap.fill(
                f"On {row['slice']}, {row['strategy']} takes {row['updates'] / most['updates']:.0%}"
                f" of the updates of {most['strategy']} but {row['seconds'] / most['seconds']:.0%} "
                "of its time: fewer updates are not less time there.", 100))
    return said
