"""How speeds are measured: side by side in one process, turn by turn, as ratios."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from experiments.markdown_table import markdown_table


class Measurement(NamedTuple):
    """One row of the table."""

    name: str
    setting: str  # what ran, in a few words
    target: str  # what is to be reached; "" where the values are only reported
    unit: str  # of the values; "x" for a ratio
    values: list[float]  # one of each repeat; [] where nothing could be measured
    note: str = ""  # why nothing could be measured, or a restriction of the values
    seconds: Mapping[str, list[float]] = {}  # what the values were made from


def paired(
    rows: Mapping[str, Callable[[], None]], repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each row in each repeat. The rows take turns; every other repeat is backwards.

    So whatever else the machine does falls on all rows alike, and no row always follows the same.
    With `time.process_time` for a clock, seconds are the process's own, all threads together.
    """
    for call in rows.values():
        call()  # warm
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for repeat in range(repeats):
        for name in list(rows)[:: 1 if repeat % 2 else -1]:
            began = clock()
            rows[name]()
            seconds[name].append(clock() - began)
    return seconds


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """above / below, of each repeat."""
    return [round(a / b, 4) for a, b in zip(above, below, strict=True)]


def beside(
    name: str, setting: str, target: str, rows: Mapping[str, Callable[[], None]], repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> Measurement:
    """The seconds of the first of two rows over those of the second; see `paired`."""
    seconds = paired(rows, repeats, clock)
    return Measurement(name, setting, target, "x", ratios(*seconds.values()), seconds=seconds)


def check_same_loss(ours: float, theirs: float, tolerance: float) -> None:
    """Raises RuntimeError if two losses differ by more than a share of the second."""
    if abs(ours - theirs) > tolerance * theirs:
        raise RuntimeError(f"not the same training: the losses are {ours} and {theirs}.")


def spread(measured: Measurement) -> str:
    """The median and the range with the unit; a dash where there are no values."""
    if not measured.values:
        return "-"
    digits, unit = (3, "") if measured.unit == "x" else (4, f" {measured.unit}")
    median, low, high = (f"{value:.{digits}g}" for value in (
        statistics.median(measured.values), min(measured.values), max(measured.values)))
    return f"{median}{unit}" + f" ({low} to {high})" * (len(measured.values) > 1)


def markdown(measurements: Sequence[Measurement], machine: str) -> str:
    """The table."""
    rows = []
    for row in measurements:
        values = spread(row) if row.values or not row.note else ""
        rows.append([f"{row.name}<br>{row.setting}", row.target or "reported",
                     "; ".join(filter(None, [values, row.note])), str(len(row.values)), machine])
    return markdown_table(["measurement", "to reach", "median (range)", "n", "machine"], rows)
