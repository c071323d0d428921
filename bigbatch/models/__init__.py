"""Networks, one architecture per file, with ghost batch normalisation and per-example dropout."""
