"""Where this machine keeps what can be made again: compiled programs, plans, copies of data."""

import os
from pathlib import Path

VARIABLE = "XDG_CACHE_HOME"


def folder(*parts: str) -> str:
    """`bigbatch`, with folders in it, in $XDG_CACHE_HOME, or in ~/.cache where that is not set.

    The ~ stays: who opens the folder replaces it, and knows what to do for a user without a home.
    """
    named = os.environ.get(VARIABLE, "")
    # The standard has a relative path passed over.
    return str(Path(named if Path(named).is_absolute() else "~/.cache", "bigbatch", *parts))
