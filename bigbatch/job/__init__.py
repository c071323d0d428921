"""The processes and devices of a job."""
