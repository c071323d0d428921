"""Networks, one architecture a file, and the two layers that know of ghost batches."""
