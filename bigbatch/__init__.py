"""Train to the same curve in fewer updates: grow the batch where others decay the rate."""

__version__ = "0.2.0"
