"""Everything that is written to a disk or a bucket: logs, workdirs and checkpoints."""
