"""Evaluates a run's last checkpoint, or an earlier one, over the whole test set.

    python -m bigbatch.evaluate --workdir=DIR [--at=EXAMPLES_SEEN]    (or gs://bucket/path)

or, where the package is installed, `bigbatch-evaluate` in the place of `python -m
bigbatch.evaluate`.
"""

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from bigbatch import command_line
from bigbatch.config import saved_config
from bigbatch.data.feed import open_feed
from bigbatch.job.devices import make_mesh, pin_options
from bigbatch.job.output import answer
from bigbatch.mistake import Mistake
from bigbatch.storage import checkpoint
from bigbatch.storage.logs import finite
from bigbatch.tasks import contract
from bigbatch.update import network, sharding, update
from bigbatch.update.evaluation import make_evaluate, networks_of, whole_test_set


def evaluate_run(
    workdir: str | Path, data_dir: str = "", examples_seen: int | None = None
) -> dict[str, Any]:
    """Evaluates a checkpoint in `workdir`; nothing is written.

    Where the run's parameters are in pieces, they are here too, and each process reads those that
    its devices hold. In a job of several processes all of them make this call.

    Args:
        workdir: of a run, finished or not.
        data_dir: where the data set is now; "" for where the run found it.
        examples_seen: the checkpoint's position; None for the newest whole one.

    Returns:
        `updates`, `examples_seen`, `epoch`, `test_loss` and what else the run's task reports, such
        as `test_accuracy`; of a run that keeps an average of its weights all of it also with
        `_average` at the end of its name.

    Raises:
        Mistake: if there is no such checkpoint or it is not whole, or the data is not the run's.
    """
    mesh = make_mesh()
    with checkpoint.opened(workdir, examples_seen, in_job=True) as found:
        run, config = found.run, sharding.for_any_devices(saved_config(found.run))
        if data_dir:
            config.data.dir = data_dir
        pin_options(config.dtype)
        net = network.build(config)
        shapes = update.abstract_state(config, net, mesh, optimizer=False)
        state = checkpoint.restore(found.path, shapes, found.mirror)
    seen = run["examples_seen"]
    task = contract.task_of(config)
    fields, data = contract.fields_of(config, task), contract.load(config, task)
    fed = open_feed(config, fields, data, mesh, (), (), seen, [seen])
    program, networks = make_evaluate(config, net, mesh), networks_of(state._asdict())
    with contextlib.closing(fed):
        result = whole_test_set(config, program, networks, fed)
    return {"updates": run["updates"], "examples_seen": seen,
            "epoch": seen / config.data.train_examples, **result}


def main(arguments: Sequence[str]) -> None:
    """Prints the evaluation of --workdir as one JSON object, as the logs have its numbers."""
    given = flags.FLAGS
    if not given.workdir:
        raise Mistake("--workdir is missing: the folder of the run to evaluate.")
    found = evaluate_run(given.workdir, given.data_dir, given.at)
    answer(json.dumps(finite(found), allow_nan=False))


def define_flags() -> None:
    """Only of the program itself: `main` has a --workdir too, and either may import the other."""
    flags.DEFINE_string("workdir", None, "Folder of the run to evaluate.")
    flags.DEFINE_integer(
        "at", None, "Position (examples seen) of the checkpoint to evaluate; the newest without.")
    flags.DEFINE_string("data_dir", "", "TFDS data_dir, where it is no more the run's.")


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
