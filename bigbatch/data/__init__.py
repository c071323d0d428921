"""Where the examples come from, in which order, and how they are augmented."""
