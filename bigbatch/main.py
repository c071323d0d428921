"""Trains a config in a workdir; the same command again continues.

    python -m bigbatch.main --config=configs/digits.py:increase --workdir=DIR

Exit status: 0 at the end of the run, 2 for a mistake in what was asked, 3 after
--stop_after_phase, 42 after SIGTERM (start the same command again), 1 for anything else.
"""

from collections.abc import Sequence

import jax
from absl import flags

from bigbatch import command_line, preemption, train

command_line.define_config()
WORKDIR = flags.DEFINE_string("workdir", None, "Folder for logs and checkpoints.")
STOP_AFTER_PHASE = flags.DEFINE_string(
    "stop_after_phase", "", "Stop with a checkpoint after this phase (name or number)."
)
CACHE = flags.DEFINE_string(
    "compilation_cache", "~/.cache/bigbatch", "Folder for compiled programs; empty for none."
)
STOPPED_STATUS = 3
FAILED_STATUS = 1


def main(arguments: Sequence[str]) -> None:
    """Runs `train.train_and_evaluate` with the command line's config."""
    config = command_line.config()
    if not WORKDIR.value:
        raise ValueError("--workdir is missing: the folder for this run's logs and checkpoints.")
    command_line.keep_compiled_programs(CACHE.value)
    try:
        train.train_and_evaluate(config, WORKDIR.value, STOP_AFTER_PHASE.value)
    except train.StoppedAfterPhase:
        command_line.leave(STOPPED_STATUS)
    except train.Preempted:
        command_line.leave(preemption.EXIT_STATUS)
    except (train.NotFinite, train.checkpoint.SaveError) as error:
        command_line.leave(FAILED_STATUS, str(error))
    except jax.errors.JaxRuntimeError as error:
        command_line.leave(FAILED_STATUS, str(error))


if __name__ == "__main__":
    command_line.run(main)
