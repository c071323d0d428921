"""All that touches a disk or a bucket: logs, workdirs, checkpoints."""
