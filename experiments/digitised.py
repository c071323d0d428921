"""The points that were read off the paper's plots: paper/digitised.csv, see paper/README.md."""

import csv
import functools
from pathlib import Path
from typing import NamedTuple

FILE = Path(__file__).parent / "paper" / "digitised.csv"


class Stretch(NamedTuple):
    """The mean of a plotted curve of the paper over a stretch of its x axis."""

    panel: str
    curve: str
    start: float
    end: float
    mean: float


@functools.cache
def read() -> list[Stretch]:
    """All points."""
    with FILE.open(encoding="utf-8", newline="") as file:
        return [
            Stretch(row["figure"], row["curve"], float(row["from"]), float(row["to"]),
                    float(row["mean"]))
            for row in csv.DictReader(file)
        ]
