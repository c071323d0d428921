"""What a program prints. It shows how a run goes, and never ends one."""

import contextlib
import os
import sys
from typing import Any, TextIO

from bigbatch.mistake import Mistake


class Unbreakable:
    """A text stream whose errors are passed over: what cannot be shown any more is lost.

    So a run goes on where its terminal was closed, `head` has read enough, or the disk is full.
    """

    def __init__(self, stream: TextIO | None):
        """`stream` is what it writes to; None, as Python calls a closed one, for nothing."""
        # Kept open: a file opened later would otherwise take the place of the closed one.
        self._stream = stream or open(os.devnull, "w", encoding="utf-8")

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def unbreakable(stream: TextIO | None) -> Unbreakable:
    """`stream` as an Unbreakable, if it is none yet."""
    return stream if isinstance(stream, Unbreakable) else Unbreakable(stream)


def say(text: str) -> None:
    """Prints a line about what goes on, on stderr."""
    print(text, file=unbreakable(sys.stderr), flush=True)


def answer(text: str) -> None:
    """Prints what the user asked for, on stdout. A reader that has read enough is no error.

    Raises:
        Mistake: if it cannot be written, as on a full disk.
    """
    try:
        print(text, flush=True)
    except OSError as error:
        sys.stdout = unbreakable(None)  # the interpreter's end would find it broken again
        if not isinstance(error, BrokenPipeError):
            raise Mistake(f"stdout cannot be written: {error.strerror}.") from None
