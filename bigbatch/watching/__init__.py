"""What people can see of a run: logs, progress, TensorBoard and traces."""
