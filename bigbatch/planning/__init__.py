"""What a config needs on TPU slices, found without them by compiling for them."""
