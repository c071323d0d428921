"""Branches of a run from one of its checkpoints: how they are made, and how they compare."""
