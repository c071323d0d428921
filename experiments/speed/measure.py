"""How figures of speed are measured: side by side in one process, turn by turn, as ratios."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from experiments.markdown_table import markdown_table


class Figure(NamedTuple):
    """One row of the table."""

    name: str
    setting: str  # what ran, in a few words
    target: str  # what is to be reached; "" where it is only reported
    unit: str  # of the values; "x" for a ratio
    values: list[float]  # one a repeat; [] where nothing could be measured
    note: str = ""  # why not, or what the values do not say
    seconds: Mapping[str, list[float]] = {}  # what the values were made from


def paired(
    rows: Mapping[str, Callable[[], None]], repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each row in each repeat, in turns; every other repeat backwards.

    So whatever else the machine does falls on all rows alike, and none is always after the same.
    With `time.process_time` for a clock, seconds are the process's own, all threads together.
    """
    for run in rows.values():
        run()  # warm
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for repeat in range(repeats):
        for name in list(rows)[:: 1 if repeat % 2 else -1]:
            began = clock()
            rows[name]()
            seconds[name].append(clock() - began)
    return seconds


def ratios(above: list[float], below: list[float], factor: float = 1.0) -> list[float]:
    """factor * above / below, of each repeat."""
    return [round(factor * a / b, 4) for a, b in zip(above, below, strict=True)]


def spread(figure: Figure) -> str:
    """The median and the range with the unit; a dash where there is none."""
    if not figure.values:
        return "-"
    digits = 3 if figure.unit == "x" else 4
    parts = [f"{value:.{digits}g}" for value in (
        statistics.median(figure.values), min(figure.values), max(figure.values))]
    unit = "" if figure.unit == "x" else f" {figure.unit}"
    return f"{parts[0]}{unit} ({parts[1]} to {parts[2]})" if len(figure.values) > 1 else (
        f"{parts[0]}{unit}")


def markdown(figures: Sequence[Figure], machine: str) -> str:
    """The table."""
    rows = []
    for figure in figures:
        said = figure.note or spread(figure)
        if figure.note and figure.values:
            said = f"{spread(figure)}; {figure.note}"
        rows.append([f"{figure.name}<br>{figure.setting}", figure.target or "reported", said,
                     str(len(figure.values)), machine])
    return markdown_table(["figure", "to reach", "median (range)", "n", "machine"], rows)
