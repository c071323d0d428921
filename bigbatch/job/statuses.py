"""The exit statuses of the commands, and of the jobs that `launch/` starts. Plain Python."""

FINISHED = 0
FAILED = 1  # an error, or a plan that does not fit on its slices
MISTAKE = 2  # the command line, the config or the data are wrong
STOPPED_AFTER_PHASE = 3  # the run stopped where --stop_after_phase says
AGAIN = 42  # the same command is to be started again; the restart rules of GKE and xpk use 42
INTERRUPTED = 128 + 2  # a second Ctrl-C ended the process without a checkpoint
# The status of a process is unknown, as after a restart of its machine. It counts as killed.
LOST = 128 + 9
# JAX aborts a process when another one of its job is lost. The cause is the other process's.
ABORTED = 128 + 6
SUCCESS = (FINISHED, STOPPED_AFTER_PHASE)
