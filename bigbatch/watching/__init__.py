"""What a person sees of a run: logs, progress, TensorBoard, traces."""
