"""The processes and devices of a job, where a job is one start of a run on one or more hosts."""
