"""Traces a few updates for TensorBoard and Perfetto: --profile=START:COUNT.

Updates are counted from 1 over the whole run, so the same command traces the same updates however
often the run was stopped before. A trace begins when the devices have finished everything that was
dispatched before its first update, and ends when they have finished its last one. Each process
writes a trace of its own.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from bigbatch.mistake import Mistake
from bigbatch.storage import bucket

FOLDER = "profile"  # in the workdir


class Span(NamedTuple):
    """The first and last update to trace, counted from 1 over the whole run."""

    first: int
    last: int


def parse(text: str, updates: int) -> Span | None:
    """The updates that --profile names; None if it is "".

    Args:
        text: the flag's value, START:COUNT or "".
        updates: the number of updates of the whole run.

    Raises:
        Mistake: if `text` has another form, or the run has fewer updates.
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
    """Traces the updates of a span when the run comes to them."""

    def __init__(
        self, span: Span | None, updates: int, folder: Path, workdir: str | Path,
        notice: Callable[[str], None],
    ):
        """Gives a notice if the first update of `span` was made before this start.

        Args:
            span: the updates to trace; None for none.
            updates: made before this start.
            folder: the local folder of the workdir, or of its mirror.
            workdir: a folder, or gs://bucket/path.
            notice: called with each line that the user should see.
        """
        self._span, self._workdir, self._notice = span, workdir, notice
        self._folder, self._running = folder / FOLDER, False
        if jax.process_count() > 1:
            self._folder /= f"process-{jax.process_index()}"
        if span and updates >= span.first:
            notice(f"--profile: update {span.first} was made before this start; nothing is traced")
            self._span = None

    def before(self, number: int, newest: Any) -> None:
        """Starts the trace if it begins here. To be called before an update is dispatched.

        Args:
            number: of the update, from 1.
            newest: arrays that the program dispatched last returns, to wait for.
        """
        if self._span and number == self._span.first:
            jax.block_until_ready(newest)
            options = jax.profiler.ProfileOptions()
            # Otherwise each Python call is an event and takes several times longer.
            options.python_tracer_level = 0
            jax.profiler.start_trace(
                self._folder, create_perfetto_trace=True, profiler_options=options)
            self._running = True

    def after(self, number: int, newest: Any) -> None:
        """Ends the trace if it ends here. To be called after the update was dispatched."""
        if self._span and number == self._span.last:
            jax.block_until_ready(newest)
            self._write(f"updates {self._span.first} to {number}")

    def close(self) -> None:
        """Ends a trace that the end of the run cuts short."""
        if self._running:
            self._write(f"updates from {self._span.first} on, cut short")

    def _write(self, what: str) -> None:
        self._running = False
        jax.profiler.stop_trace()
        where = str(self._folder)
        if bucket.in_bucket(self._workdir):
            url = f"{str(self._workdir).rstrip('/')}/{FOLDER}"
            try:
                self._upload(url)
                where = url
            except Mistake as error:  # no reason to end the run
                self._notice(f"--profile: {error}")
                return
        self._notice(f"trace of {what} in {where}")

    def _upload(self, url: str) -> None:
        """Uploads the trace. The mirror does not do this, as it sends only logs and checkpoints."""
        with bucket.explained(url):
            files, root = bucket.connect(url)
            above = self._folder.parent if jax.process_count() > 1 else self._folder
            written = [file for file in self._folder.rglob("*") if file.is_file()]
            files.put(list(map(str, written)),
                      [f"{root}/{file.relative_to(above)}" for file in written])
