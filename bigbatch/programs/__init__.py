"""The compiled XLA programs of a run: lowered, compiled in the background, and dispatched."""
