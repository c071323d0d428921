"""Finds the critical batch of a run by branching: how much larger could its batch be from here on?

    python -m bigbatch.branch --workdir=DIR --at="3 epochs" --factors=1,2,4,8 --for="2 epochs"

or, where the package is installed, `bigbatch-branch` in the place of `python -m bigbatch.branch`.

From the run's checkpoint at --at (the newest without) one branch for each factor sees the same
examples in the same order, in batches that are larger by its factor, with the rate that the
exchange gives it. The losses are compared after equal examples. Each branch is an ordinary run in a
folder of --output. The same command continues those that are not at their end; so does, for each,
the command in branches.json, on any machine and side by side: `--prepare` only writes their
folders. Several runs, whose seeds differ, are given as --workdir=DIR,DIR,DIR: only then, or with
--orders, does the interval cover more than one course of training.

Exit status: as of bigbatch.main; 0 where all branches are at their end.
"""

import gc

from bigbatch.job import signals

if __name__ == "__main__":
    signals.end_on_signals()  # before the imports below, which take seconds
    gc.disable()  # as in bigbatch.main

import contextlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags

from bigbatch import command_line, train
from bigbatch.branching import branches, results
from bigbatch.branching.branches import Branch
from bigbatch.job import output, processes, statuses
from bigbatch.mistake import Mistake
from bigbatch.programs import program_cache
from bigbatch.storage import bucket, writing
from bigbatch.storage.logs import replace_text
from bigbatch.storage.workdir import local_folder

LISTED = "branches.json"


def make_branches(
    workdirs: Sequence[str], at: str, factors: Sequence[int], length: str, folder: str | Path = "",
    orders: int = 1, reset: bool = False,
) -> list[Branch]:
    """Plans the branches of runs, and writes the workdirs of those that have none yet.

    Args:
        workdirs: of the runs: folders, or gs://bucket/path. They differ in nothing but their seeds.
        at: the checkpoint to branch from; see `branches.opened_checkpoint`.
        factors: of the batch; 1 is added where it is missing.
        length: how many examples the branches see; see `branches.plan_stretch`.
        folder: for the branches; "" for one in the first run's workdir.
        orders: how many orders of the examples to come; the first is the run's own. The others are
            as if the run had another seed from here on, so what is left of the epoch may hold
            examples that the run has seen in it.
        reset: whether the optimizer begins anew in all branches, also in that of the factor 1.

    Raises:
        Mistake: if there is no such checkpoint, stretch or batch, two runs have one seed, or the
            folder holds other branches.
    """
    factors = sorted({1, *factors})
    if factors[0] < 1 or len(factors) < 2:
        raise Mistake(f"--factors is {factors}; it must have whole numbers over 1, such as 2,4,8.")
    if len(set(workdirs)) < len(workdirs):
        raise Mistake(f"--workdir is {','.join(workdirs)}: a run is named twice, so it would be "
                      "taken for two seeds; name each once, or ask for several --orders.")
    if "" in workdirs:
        raise Mistake(f"--workdir is {','.join(workdirs)!r}: a name between commas is missing.")
    if not folder and bucket.in_bucket(workdirs[0]):
        raise Mistake(f"{workdirs[0]} is in a bucket: give a folder for the branches by --output.")
    with contextlib.ExitStack() as opened:
        found = [opened.enter_context(branches.opened_checkpoint(source, at))
                 for source in workdirs]
        _check_seeds(workdirs, [one.run["config"]["seed"] for one in found])
        seen = found[0].run["examples_seen"]
        folder = local_folder(folder or Path(workdirs[0]) / "branches" / str(seen))
        planned = []
        for index, (source, one) in enumerate(zip(workdirs, found, strict=True)):
            own = folder / f"run{index}" if len(workdirs) > 1 else folder
            planned.append(branches.plan_branches(source, one.run, length, factors, orders, own))
            first, other = planned[0][0].stretch, planned[-1][0].stretch
            if other != first:
                raise Mistake(
                    f"{source} would branch from example {other.start} to {other.end} with a batch "
                    f"of {other.batch_size}, and {workdirs[0]} from {first.start} to {first.end} "
                    f"with {first.batch_size}: all runs need a checkpoint at the same place, and "
                    "the same batch there.")
        for one, own in zip(found, planned, strict=True):
            for branch in own:
                branches.make(branch, one, reset)
    return [branch for own in planned for branch in own]


def _check_seeds(workdirs: Sequence[str], seeds: Sequence[int]) -> None:
    """Raises Mistake if two runs have one seed: they would be taken for two."""
    for index, seed in enumerate(seeds):
        if seed in seeds[:index]:
            raise Mistake(
                f"{workdirs[seeds.index(seed)]} and {workdirs[index]} both have the seed {seed}, "
                "so they tell nothing of other seeds; name runs whose seeds differ, or one of "
                "these.")


def train_branches(found: Sequence[Branch]) -> None:
    """Trains each branch that is not at its end, in order.

    Raises:
        Preempted: if told to stop; the same call continues.
    """
    for branch in found:
        if results.losses_of(branch) is not None:
            continue
        output.say(f"bigbatch: batch {branch.factor * branch.stretch.batch_size} in "
                   f"{branch.folder}")
        try:
            train.train_and_evaluate(branch.config, branch.folder, branch.last_phase)
        except train.StoppedAfterPhase:
            pass
        except train.NotFinite as error:
            output.say(f"bigbatch: {error}")


def compare(found: Sequence[Branch], margin: float) -> dict[str, Any]:
    """What `results.judge` says of branches.

    Raises:
        Mistake: if one is not at its end, or the run itself diverges.
    """
    losses = [results.losses_of(branch) for branch in found]
    for branch, one in zip(found, losses, strict=True):
        if one is None:
            raise Mistake(f"the branch in {branch.folder} is not at its end: {branch.command}")
    return results.judge(found, losses, margin)


def main(arguments: Sequence[str]) -> None:
    """Makes, trains and compares the branches that the command line asks for."""
    given = flags.FLAGS
    if not given.workdir:
        raise Mistake("--workdir is missing: the folder of the run to branch from.")
    if not math.isfinite(given.margin):
        raise Mistake(f"--margin is {given.margin}; it must be a number, such as 0.01.")
    if not given["for"].value:
        raise Mistake('--for is missing: how many examples the branches see, such as "2 epochs".')
    try:
        processes.join("", 0, -1, 100)
        if jax.process_count() > 1:
            raise Mistake(
                "bigbatch.branch is one process, and this job has several: write the branches on "
                "one machine by --prepare, and train each with its command in branches.json.")
        if notice := program_cache.keep(given.compilation_cache):
            output.say(f"bigbatch: {notice}")
        found = make_branches(
            given.workdir, given.at, _factors(given.factors), given["for"].value, given.output,
            given.orders, given.reset_optimizer)
        top = found[0].folder.parent if len(given.workdir) == 1 else found[0].folder.parents[1]
        listed = {"branches": [
            {"workdir": str(one.folder), "of": one.source, "factor": one.factor,
             "order": one.order, "from": one.stretch.start, "to": one.stretch.end,
             "reset_optimizer": given.reset_optimizer, "command": one.command}
            for one in found]}
        if given.prepare or not (top / LISTED).exists():  # or what was compared before is there
            _write(top, listed)
        if given.prepare:
            output.answer(json.dumps(listed, indent=1))
            return
        train_branches(found)
        judged = compare(found, given.margin)
        _write(top, judged | listed)
        results.draw(top / "branches.png", judged)
        output.answer(results.table(judged))
    except train.Preempted:
        processes.leave(statuses.AGAIN)
    except writing.WriteError as error:
        processes.leave(statuses.FAILED, str(error))
    except jax.errors.JaxRuntimeError as error:
        processes.leave(*processes.explain(error))
    processes.leave(statuses.FINISHED)


def _factors(texts: Sequence[str]) -> list[int]:
    try:
        return [int(text) for text in texts]
    except ValueError:
        raise Mistake(
            f"--factors is {','.join(texts)}; it must have whole numbers, such as 2,4,8.") from None


def _write(folder: Path, content: dict[str, Any]) -> None:
    try:
        replace_text(folder / LISTED, json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise Mistake(f"{error.filename} cannot be written: {error.strerror}") from None


def define_flags() -> None:
    """Only of the program itself: other programs have a --workdir too."""
    flags.DEFINE_list("workdir", [], "Run to branch from; or several, whose seeds differ.")
    flags.DEFINE_string("at", "", 'Where: "3 epochs", "5000 examples"; the newest checkpoint '
                        "without.")
    flags.DEFINE_list("factors", ["2", "4", "8"], "Of the batch; 1 is added.")
    flags.DEFINE_string("for", "", 'How many examples: "2 epochs", "1e9 tokens".')
    flags.DEFINE_string("output", "", "Folder for the branches; in the workdir without.")
    flags.DEFINE_integer("orders", 1, "Orders of the examples to come.", lower_bound=1)
    flags.DEFINE_bool("reset_optimizer", False, "Begin with an optimizer that has seen nothing.")
    flags.DEFINE_float("margin", 0.01, "How much higher a loss still is as good.", lower_bound=0.0)
    flags.DEFINE_bool("prepare", False, "Write the branches' folders, and train none.")
    flags.DEFINE_string("compilation_cache", None, "Folder for compiled programs; empty for none.")


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
