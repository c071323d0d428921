"""A trace of a few updates, for TensorBoard and Perfetto: --profile=START:COUNT.

Updates are counted from 1 in the whole run, so that the same command traces the same ones however
often it was stopped before. Nothing else happens in a trace: it begins when all before has finished
on the devices, and ends when its last update has. Each process traces itself.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from bigbatch.mistake import Mistake
from bigbatch.storage import bucket

FOLDER = "profile"  # of the workdir


class Span(NamedTuple):
    """The updates to trace, of the whole run."""

    first: int
    last: int


def parse(text: str, updates: int) -> Span | None:
    """What --profile asks for; None where it is "".

    Args:
        text: START:COUNT.
        updates: of the whole run.

    Raises:
        Mistake: if it says anything else, or the run ends before.
    """
    if not text:
        return None
    match = re.fullmatch(r"(\d+):(\d+)", text)
    start, count = map(int, match.groups()) if match else (0, 0)
    if start < 1 or count < 1:
        raise Mistake(
            f"--profile is {text!r}; write START:COUNT, two whole numbers from 1 on, as 100:5 for "
            "the run's updates 100 to 104."
        )
    if start + count - 1 > updates:
        raise Mistake(
            f"--profile is {text!r}, updates {start} to {start + count - 1}, but the run has "
            f"{updates}."
        )
    return Span(start, start + count - 1)


class Tracer:
    """Traces a run's updates when their turn comes."""

    def __init__(
        self, span: Span | None, updates: int, folder: Path, workdir: str | Path,
        tell: Callable[[str], None],
    ):
        """Says so at once if this start of the run comes too late for the trace.

        Args:
            span: what to trace; None for nothing.
            updates: made before this start.
            folder: of this machine, that the workdir is or is mirrored in.
            workdir: of the run.
            tell: called with what a person watching should know.
        """
        self._span, self._workdir, self._tell = span, workdir, tell
        self._folder, self._running = folder / FOLDER, False
        if jax.process_count() > 1:
            self._folder /= f"process-{jax.process_index()}"
        if span and updates >= span.first:
            tell(f"--profile: update {span.first} was made before this start; nothing is traced")
            self._span = None

    def before(self, number: int, newest: Any) -> None:
        """To be called before an update is dispatched.

        Args:
            number: of the update, from 1.
            newest: arrays that are there when all that was dispatched so far has finished.
        """
        if self._span and number == self._span.first:
            jax.block_until_ready(newest)
            options = jax.profiler.ProfileOptions()
            # Each Python call would be an event, and take several times longer.
            options.python_tracer_level = 0
            jax.profiler.start_trace(
                self._folder, create_perfetto_trace=True, profiler_options=options)
            self._running = True

    def after(self, number: int, newest: Any) -> None:
        """The same after it was dispatched."""
        if self._span and number == self._span.last:
            jax.block_until_ready(newest)
            self._write(f"updates {self._span.first} to {number}")

    def close(self) -> None:
        """Ends a trace that is under way, where the run is ended in it."""
        if self._running:
            self._write(f"updates from {self._span.first} on, cut short")

    def _write(self, what: str) -> None:
        self._running = False
        jax.profiler.stop_trace()
        where = str(self._folder)
        if bucket.in_bucket(self._workdir):
            url = f"{str(self._workdir).rstrip('/')}/{FOLDER}"
            try:
                self._bring_up(url)
                where = url
            except Mistake as error:  # no reason to end a run
                self._tell(f"--profile: {error}")
                return
        self._tell(f"trace of {what} in {where}")

    def _bring_up(self, url: str) -> None:
        """Copies the trace to the bucket: unlike logs it never changes, and goes up on its own."""
        with bucket.explained(url):
            files, root = bucket.connect(url)
            above = self._folder.parent if jax.process_count() > 1 else self._folder
            written = [file for file in self._folder.rglob("*") if file.is_file()]
            files.put(list(map(str, written)),
                      [f"{root}/{file.relative_to(above)}" for file in written])
