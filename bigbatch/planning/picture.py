"""Shows the learning rate, the batch and the noise of a schedule over a run."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from bigbatch import schedule
from bigbatch.mistake import Mistake
from bigbatch.schedule import Phase, Recipe

BARS = "▁▂▃▄▅▆▇█"
WIDTH, POINTS = 72, 2000  # columns in the terminal, updates in a file


class Point(NamedTuple):
    """One update of a schedule."""

    epoch: float
    learning_rate: float
    batch_size: int
    noise: float | None  # relative to the reference's at its peak; None with the exchange "none"


def points(recipe: Recipe, phases: Sequence[Phase], count: int) -> list[Point]:
    """Updates of a run, evenly spaced over its examples; where it has few, some come repeatedly.

    Args:
        recipe: as its strategy follows it.
        phases: of the run.
        count: how many.
    """
    found = []
    for index in range(count):
        example = (2 * index + 1) * phases[-1].end_example // (2 * count)
        phase = schedule.phase_at(phases, example)
        before = (example - phase.start_example) // phase.batch_size
        start = phase.start_example + before * phase.batch_size
        rate = schedule.rates_at(recipe, phase.batch_size, start).learning_rate
        found.append(Point(start / recipe.examples, rate, phase.batch_size,
                           schedule.noise(recipe, rate, phase.batch_size)))
    return found


def in_terminal(recipe: Recipe, phases: Sequence[Phase]) -> str:
    """Three rows of bars on logarithmic scales, with the least and the largest of what they show.

    They show one update in each column, so what lies between is not in them.
    """
    shown = points(recipe, phases, WIDTH)
    rows = [("rate", [point.learning_rate for point in shown]),
            ("batch", [point.batch_size for point in shown])]
    if shown[0].noise is not None:
        rows.append(("noise", [point.noise for point in shown]))
    lines = [f"{name:5}  {_bars(values)}  {_number(min(values))} to {_number(max(values))}"
             for name, values in rows]
    end = f"epoch {phases[-1].end_example / recipe.examples:.4g}"
    return "\n".join([*lines, f"{'':5}  {'epoch 0':<{WIDTH - len(end)}}{end}"])


def _number(value: float) -> str:
    return f"{value:,}".replace(",", " ") if isinstance(value, int) else f"{value:.4g}"


def _bars(values: Sequence[float]) -> str:
    over_0 = [value for value in values if value > 0]
    if not over_0:
        return BARS[0] * len(values)
    low, high = math.log(min(over_0)), math.log(max(over_0))
    scale = (len(BARS) - 1) / (high - low) if high - low > 1e-9 else 0.0
    top = 0 if scale else len(BARS) - 1
    return "".join(
        BARS[round((math.log(value) - low) * scale) or top] if value > 0 else BARS[0]
        for value in values)


def draw(file: Path, title: str, recipe: Recipe, phases: Sequence[Phase]) -> None:
    """Draws rate, batch and noise against the epochs, and writes the picture.

    Args:
        file: a name with an ending that matplotlib knows, such as .png, .svg or .pdf.
        title: of the picture.
        recipe: as its strategy follows it.
        phases: of the run.

    Raises:
        Mistake: if matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure  # only this picture needs it
    except ImportError:
        raise Mistake("--picture needs matplotlib: pip install matplotlib.") from None
    shown = points(recipe, phases, POINTS)
    rows = [("learning rate", [point.learning_rate for point in shown]),
            ("batch size", [point.batch_size for point in shown])]
    if shown[0].noise is not None:
        rows.append(("noise, of its peak's", [point.noise for point in shown]))
    figure = Figure(figsize=(7, 1 + 1.8 * len(rows)), layout="constrained")
    for axes, (name, values) in zip(
            figure.subplots(len(rows), 1, sharex=True), rows, strict=True):
        axes.step([point.epoch for point in shown], values, where="post")
        axes.set_yscale("log")
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)
    axes.set_xlabel("epoch")
    figure.suptitle(title, fontsize="medium")
    try:
        figure.savefig(file, dpi=150)
    except (OSError, ValueError) as error:
        raise Mistake(f"--picture={file} cannot be written: {error}") from None
