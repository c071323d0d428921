"""What a run leaves, for use outside of it: `bigbatch.checkpoint.load("WORKDIR")`."""

from bigbatch.storage.checkpoint import load

__all__ = ["load"]
