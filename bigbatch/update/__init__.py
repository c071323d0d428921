"""The mathematics of one update and of an evaluation."""
