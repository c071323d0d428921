"""The exit statuses of the programs here, and of the jobs that `launch/` starts. Plain Python."""

FINISHED = 0
FAILED = 1  # also of a plan that does not fit on its slices
MISTAKE = 2  # in what was asked
STOPPED_AFTER_PHASE = 3  # as --stop_after_phase asked
AGAIN = 42  # start the same command again; GKE's and xpk's restart rules take this number
INTERRUPTED = 128 + 2  # by a second Ctrl-C, which waits for nothing
# A process of which nothing is known any more, as after a restart of its machine, counts as killed.
LOST = 128 + 9
# How JAX ends a process whose job has fallen apart: a consequence, the cause is another process's.
ABORTED = 128 + 6
SUCCESS = (FINISHED, STOPPED_AFTER_PHASE)
