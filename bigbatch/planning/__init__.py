"""What a config needs of slices that are not there."""
