"""What a run shows on the terminal: lines, and a bar with the remaining time over all phases."""

import sys
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from bigbatch.job.output import unbreakable
from bigbatch.schedule import Phase


def seconds_to_go(
    phases: Sequence[Phase], examples_seen: int, seconds_per_update: Mapping[int, float]
) -> float | None:
    """The seconds of training left, without evaluations and saves; None if no speed was measured.

    Args:
        phases: of the run.
        examples_seen: the position of the run.
        seconds_per_update: as measured, by batch size. For a batch size that was not measured, the
            seconds per example of the largest measured batch size are used.
    """
    if not seconds_per_update:
        return None
    known = max(seconds_per_update)
    total = 0.0
    for phase in phases:
        left = phase.end_example - max(examples_seen, phase.start_example)
        if left > 0:
            pace = seconds_per_update.get(
                phase.batch_size, seconds_per_update[known] / known * phase.batch_size
            )
            total += left / phase.batch_size * pace
    return total


def format_seconds(seconds: float | None) -> str:
    """Seconds as 1:02:03 or 02:03; "--:--" for None."""
    if seconds is None:
        return "--:--"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes:02}:{rest:02}"


def position(examples_seen: int, examples: int, tokens: int | None) -> str:
    """Where a run is: "epoch 1.50", or "epoch 1.50, 2.5e9 tokens".

    Args:
        examples_seen: the position.
        examples: N, the examples of an epoch.
        tokens: of an example; None if the task has none.
    """
    epoch = f"epoch {examples_seen / examples:.2f}"
    return f"{epoch}, {format_tokens(examples_seen * tokens)} tokens" if tokens else epoch


def format_tokens(tokens: int) -> str:
    """A number of tokens in four digits: 512, 2.5e9."""
    return f"{tokens:.4g}".replace("e+0", "e").replace("e+", "e")


def describe(phase: Phase, phases: Sequence[Phase]) -> str:
    """One line that is shown when a phase begins."""
    rate = f"{phase.learning_rate:g}"
    if phase.learning_rate_end != phase.learning_rate:
        rate += f" to {phase.learning_rate_end:g}"
    return (
        f"phase {phase.index} of 0 to {len(phases) - 1}, {phase.name}: batch {phase.batch_size}, "
        f"rate {rate}, momentum {phase.momentum:g}, {phase.updates} updates"
    )


def describe_shares(shares: Mapping[str, float], seconds: float) -> str:
    """One line on how the time of a start was spent."""
    parts = ", ".join(f"{what} {100 * share:.1f} %" for what, share in shares.items())
    return f"time: {format_seconds(seconds)}, of which {parts}"


class Display:
    """Shows lines on stderr, and a bar if that is a terminal; nothing if `shown` is False."""

    def __init__(
        self, phases: Sequence[Phase], examples: int, tokens: int | None = None, shown: bool = True
    ):
        """`examples` and `tokens` say in what positions are shown; see `position`."""
        self._phases, self._examples, self._tokens = phases, examples, tokens
        self._console = Console(file=unbreakable(sys.stderr), quiet=not shown, soft_wrap=True)
        self._bar = Progress(
            BarColumn(), TaskProgressColumn(), TextColumn("{task.description}"),
            console=self._console, disable=not (shown and self._console.is_terminal),
        )
        self._task = self._bar.add_task("", total=phases[-1].end_example)
        self._bar.start()

    def follow(self, phases: Sequence[Phase]) -> None:
        """Shows the way to the end of other phases from now on."""
        self._phases = phases
        self._bar.update(self._task, total=phases[-1].end_example)

    def line(self, text: str) -> None:
        """Prints a line, above the bar if there is one."""
        self._console.print(text, highlight=False, markup=False)

    def position(self, examples_seen: int) -> str:
        """A position as it is shown; see the function of this name."""
        return position(examples_seen, self._examples, self._tokens)

    def advance(self, examples_seen: int, seconds_per_update: Mapping[int, float]) -> None:
        """Moves the bar to a position; see `seconds_to_go` for the arguments."""
        left = seconds_to_go(self._phases, examples_seen, seconds_per_update)
        self._bar.update(
            self._task, completed=examples_seen,
            description=f"{self.position(examples_seen)}, {format_seconds(left)} to go",
        )

    def close(self) -> None:
        """Ends the bar, so that the terminal is as before."""
        self._bar.stop()
