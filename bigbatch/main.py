"""Trains a config in a workdir; the same command again continues.

    python -m bigbatch.main --config=digits.py:increase --workdir=DIR

or, where the package is installed, `bigbatch` in the place of `python -m bigbatch.main`.

Exit status: 0 at the end of the run, 2 for a mistake in what was asked, 3 after
--stop_after_phase, 42 where the same command wants to be started again: after SIGTERM, or when
another process of the job was lost or never came. 1 for anything else.
"""

import gc

from bigbatch.job import signals

if __name__ == "__main__":
    signals.end_on_signals()  # before the imports below, which take seconds
    # Until `command_line.run`: what is imported stays, and looking through it takes an eighth of
    # the time of importing.
    gc.disable()

from collections.abc import Sequence

import jax
from absl import flags

from bigbatch import command_line, train
from bigbatch.job import output, processes, statuses
from bigbatch.mistake import Mistake
from bigbatch.programs import program_cache
from bigbatch.storage import caches, replay, writing

command_line.define_config()
WORKDIR = flags.DEFINE_string("workdir", None, "For logs and checkpoints: a folder, or gs://bucket/path.")
STOP_AFTER_PHASE = flags.DEFINE_string(
    "stop_after_phase", "", "Stop with a checkpoint after this phase (name or number)."
)
REPLAY = flags.DEFINE_string(
    "replay", "", "Workdir of a run of the strategy measured whose decisions this one takes."
)
PROFILE = flags.DEFINE_string(
    "profile", "", "START:COUNT: trace so many updates from this one on into WORKDIR/profile."
)
CACHE = flags.DEFINE_string(
    "compilation_cache", None, "Folder for compiled programs; empty for none. Without the flag: "
    f"${program_cache.VARIABLE}, or else bigbatch in ${caches.VARIABLE} (~/.cache)."
)
COORDINATOR = flags.DEFINE_string("coordinator", "", "host:port of a job's first process.")
PROCESSES = flags.DEFINE_integer("processes", 0, "How many processes the job has.")
PROCESS = flags.DEFINE_integer("process", -1, "Which one this is, from 0.")
DEAD_PEER_SECONDS = flags.DEFINE_integer(
    "dead_peer_seconds", 100, "End when another process of the job was silent for so long."
)
JOIN_SECONDS = flags.DEFINE_integer(
    "join_seconds", 300, "End when another process of the job has not come for so long."
)


def main(arguments: Sequence[str]) -> None:
    """Runs `train.train_and_evaluate` with the command line's config."""
    config = command_line.config()
    if not WORKDIR.value:
        raise Mistake("--workdir is missing: the folder for this run's logs and checkpoints.")
    try:
        processes.join(COORDINATOR.value, PROCESSES.value, PROCESS.value, DEAD_PEER_SECONDS.value,
                       JOIN_SECONDS.value)
        if notice := program_cache.keep(CACHE.value):
            output.say(f"bigbatch: {notice}")
        if REPLAY.value:
            config = replay.replay(config, REPLAY.value)
        train.train_and_evaluate(
            config, WORKDIR.value, STOP_AFTER_PHASE.value, profile=PROFILE.value)
    except train.StoppedAfterPhase:
        processes.leave(statuses.STOPPED_AFTER_PHASE, together=True)
    except train.Preempted:
        processes.leave(statuses.AGAIN, together=True)
    except writing.ProcessLost as error:
        processes.leave(statuses.AGAIN, str(error))
    except (train.NotFinite, writing.WriteError) as error:
        processes.leave(statuses.FAILED, str(error))
    except jax.errors.JaxRuntimeError as error:
        processes.leave(*processes.explain(error))
    processes.leave(statuses.FINISHED, together=True)


if __name__ == "__main__":
    command_line.run(main)
