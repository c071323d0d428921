"""Branches: runs that go on from a checkpoint of another run, with its batches times a factor.

A branch is an ordinary run in a workdir of its own. It has the state and the position of the run's
checkpoint, and the run's config with the strategy `by_hand`: the run's own batches, but for a
stretch that begins at the checkpoint, where they are multiplied by the branch's factor. The order
of the examples follows from the position, so all branches see the same examples in the same order,
and the rate follows from the batch by the exchange. With the factor 1 nothing differs from the run.
"""

import contextlib
import copy
import json
import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from bigbatch import schedule
from bigbatch.config import in_examples, make_phases, make_recipe, make_strategy, saved_config
from bigbatch.job.devices import make_mesh, pin_options
from bigbatch.mistake import Mistake
from bigbatch.storage import checkpoint, continuing, workdir, writing
from bigbatch.storage.logs import replace_text
from bigbatch.update import network, sharding, update
from bigbatch.update.optimizer import init_optimizer

# Evaluations of a stretch. Those of its second half are compared: before, the optimizer's averages
# still come from the batch before.
EVALUATIONS = 16
# Between the seeds of the orders; no two seeds that a person gives to runs are so far apart.
SEEDS_APART = 1_000_003
MADE_FOR = "branch.json"  # in a branch's workdir: which branch it is


class Stretch(NamedTuple):
    """The examples over which a run's branches differ."""

    start: int  # the examples seen at the checkpoint
    end: int
    every: int  # the examples between two evaluations; divides the stretch
    batch_size: int  # of the run, throughout the stretch


class Branch(NamedTuple):
    """A branch, made or not."""

    source: str  # the workdir of the run
    factor: int
    order: int  # of the examples to come: 0 for the run's own, or the number of another one
    stretch: Stretch
    config: ConfigDict
    last_phase: str  # the number of the phase that ends with the stretch
    folder: Path  # its workdir

    @property
    def command(self) -> str:
        """The ordinary command that trains the branch, or continues it, up to its end."""
        return (f"python -m bigbatch.main --config={self.folder / 'config.json'} "
                f"--workdir={self.folder} --stop_after_phase={self.last_phase}")


@contextlib.contextmanager
def opened_checkpoint(source: str, at: str) -> Iterator[checkpoint.Opened]:
    """Finds the checkpoint of a run from which its branches begin.

    Args:
        source: the workdir of the run.
        at: a length, as `config.lengths` has them: the checkpoint there or less than one batch
            after it. "" for the newest one.

    Raises:
        Mistake: if there is no such checkpoint, or it is not whole; or the newest is the run's end.
    """
    with checkpoint.opened(source) as newest:
        folder = newest.path.parents[1]
        if not at and newest.run["examples_seen"] == newest.run["phases"][-1]["end_example"]:
            earlier = _listed(newest.run, checkpoint.finished(folder)[:-1])
            raise Mistake(
                f"--at is missing, and the newest checkpoint of {source} is the run's end, after "
                f"which no batch is to come; it has earlier ones at: {earlier or 'no example'}.")
        if not at:
            yield newest
            return
        wanted = in_examples(saved_config(newest.run), at, "--at")
        position = _nearest(source, wanted, checkpoint.finished(folder), newest.run)
        found = checkpoint.find_at(folder, position, newest.mirror)
        yield newest._replace(path=found.path, run=found.run)


def _nearest(source: str, wanted: int, paths: Sequence[Path], run: dict[str, Any]) -> int:
    """The position of the first checkpoint at `wanted`, or less than one batch after it."""
    positions = [int(path.name) for path in paths]
    after = [position for position in positions if position >= wanted]
    if after:
        batch = next(phase["batch_size"] for phase in run["phases"]
                     if after[0] <= phase["end_example"])
        if after[0] - wanted < batch:
            return after[0]
    n = run["config"]["data"]["train_examples"]
    raise Mistake(
        f"--at asks for example {wanted} (epoch {wanted / n:.4g}) of {source}, where no checkpoint "
        f"is; there are some at the examples {_listed(run, paths)}. A run saves one every "
        "config.checkpoint_every_epochs and at the end of each phase, and keeps "
        "config.keep_checkpoints of the former."
    )


def _listed(run: dict[str, Any], paths: Sequence[Path]) -> str:
    """The positions of a run's checkpoints, in examples and epochs."""
    n = run["config"]["data"]["train_examples"]
    positions = [int(path.name) for path in paths]
    return ", ".join(f"{position} (epoch {position / n:.4g})" for position in positions)


def plan_stretch(
    config: ConfigDict, decisions: schedule.Decisions, start: int, length: str,
    factors: Sequence[int],
) -> Stretch:
    """The stretch of a run's branches: as long as asked for, rounded up.

    It is a whole number of updates of every branch, and so are its parts between two evaluations:
    all branches are evaluated after the same examples.

    Args:
        config: of the run.
        decisions: of the run.
        start: the examples seen at the checkpoint.
        length: as `config.lengths` has them.
        factors: of the branches.

    Raises:
        Mistake: if the run ends within the stretch, or changes its batch there.
    """
    phases = make_phases(config, decisions)
    phase = schedule.phase_at(phases, start)
    if phase is None:
        raise Mistake(f"--at: the run is over at example {start}, so there is nothing to branch.")
    wanted = in_examples(config, length, "--for")
    if wanted < 1:
        raise Mistake(f"--for is {length!r}; it must be over 0.")
    step = phase.batch_size * math.lcm(*factors)
    every = -(-wanted // (step * EVALUATIONS)) * step
    end = start + -(-wanted // every) * every
    rounded = f"--for={length!r}, rounded up to {end - start} examples from {start} on,"
    if end > phases[-1].nominal_end_example:
        raise Mistake(
            f"{rounded} goes past the run's end at example {phases[-1].nominal_end_example}: "
            "branch from an earlier checkpoint, over fewer examples, or by smaller factors."
        )
    for other in phases:
        if start < other.start_example < end and other.batch_size != phase.batch_size:
            raise Mistake(
                f"{rounded} goes past example {other.start_example}, where the run changes its "
                f"batch from {phase.batch_size} to {other.batch_size}: branch from there or from "
                "an earlier checkpoint, over fewer examples, or by smaller factors."
            )
    return Stretch(start, end, every, phase.batch_size)


def branch_config(
    config: ConfigDict, decisions: schedule.Decisions, stretch: Stretch, factor: int
) -> ConfigDict:
    """The config of a branch: the run's, with its batches by hand and times `factor` in a stretch.

    Args:
        config: of the run; its ramp, if it has one, goes on to divide the batches.
        decisions: of the run.
        stretch: see `plan_stretch`.
        factor: of the branch.
    """
    recipe, strategy = make_recipe(config), make_strategy(config)

    def undivided(example: int, batch: int) -> int:
        return round(batch * math.prod(
            by for epoch, by in strategy.ramp if round(epoch * recipe.examples) > example))

    path = {phase.start_example: undivided(phase.start_example, phase.batch_size)
            for phase in make_phases(config, decisions)
            if not stretch.start < phase.start_example < stretch.end}  # the rate falls there, if so
    path.setdefault(stretch.end, undivided(stretch.end, stretch.batch_size))
    path[stretch.start] = undivided(stretch.start, stretch.batch_size * factor)
    by_hand, before = [], recipe.batch_size
    for start, batch in sorted(path.items()):
        of_stretch = start in (stretch.start, stretch.end)
        if (batch != before or of_stretch) and start < round(recipe.epochs * recipe.examples):
            by_hand.append((f"{start} examples", batch))
            before = batch
    config = copy.deepcopy(config)
    with config.unlocked():
        if config.strategy == "constant":  # by_hand would follow what constant leaves out
            config.recipe.falls, config.recipe.curve = (), "steps"
        config.strategy, config.by_hand = "by_hand", tuple(by_hand)
        config.limits.max_batch_size = None
        config.eval_every_epochs = f"{stretch.every} examples"
        config.intervals_from = f"{stretch.start} examples"
    return config


def plan_branches(
    source: str, run: dict[str, Any], length: str, factors: Sequence[int], orders: int,
    output: Path,
) -> list[Branch]:
    """All branches of one run, in the order in which they are to be trained.

    Args:
        source: the workdir of the run.
        run: the content of the checkpoint's run.json.
        length: see `plan_stretch`.
        factors: of the batch; 1 is among them.
        orders: how many orders of the examples to come there are.
        output: the folder that holds their workdirs.

    Raises:
        Mistake: see `plan_stretch`; or if a branch's batch is not allowed.
    """
    own, at = saved_config(run), continuing.position_of(run)
    stretch = plan_stretch(own, at.growth.decisions, at.examples_seen, length, factors)
    found = []
    for order in range(orders):
        for factor in factors:
            config = branch_config(own, at.growth.decisions, stretch, factor)
            config.seed = (own.seed + order * SEEDS_APART) % 2**32
            last = next(phase for phase in make_phases(config)
                        if phase.end_example == stretch.end)
            found.append(Branch(
                source, factor, order, stretch, config, str(last.index),
                output / (f"x{factor}" + (f"_order{order}" if order else ""))))
    return found


def make(branch: Branch, opened: checkpoint.Opened, reset: bool) -> None:
    """Writes the workdir of a branch, unless it has been written: its config and first checkpoint.

    Args:
        branch: to make.
        opened: the run's checkpoint.
        reset: whether the optimizer begins anew.

    Raises:
        Mistake: if the workdir holds another run or branch, or cannot be written, or the network or
            the data are not there.
        WriteError: if a file in it cannot be written.
    """
    made_for = {
        **branch.stretch._asdict(), "factor": branch.factor, "order": branch.order,
        "reset_optimizer": reset, "run": opened.run["config"]}
    with workdir.open_workdir(branch.folder):
        is_made = checkpoint.find_newest(branch.folder).path is not None
        if is_made or (branch.folder / "metrics.jsonl").exists():
            _check_made_for(branch.folder, made_for)
        if is_made:
            return
        config = branch.config
        pin_options(config.dtype)
        net = network.build(config)
        shapes = update.abstract_state(sharding.for_any_devices(config), net, make_mesh())
        wanted = shapes._replace(opt_state=None) if reset else shapes
        state = checkpoint.restore(opened.path, wanted, opened.mirror)
        if reset:  # each device makes what it holds
            lies = jax.tree.map(lambda leaf: leaf.sharding, shapes.opt_state)
            init = partial(init_optimizer, config, net.in_norm)
            state = state._replace(opt_state=jax.jit(init, out_shardings=lies)(state.params))
        # The run's own config: whether the branch's may continue it is checked when it does.
        own = opened.run["config"] | {"seed": config.seed}
        begun = opened.run | {"config": own, "pending_evaluation": None}
        described = continuing.describe_run(
            config, make_phases(config), continuing.position_of(begun))
        with writing.names_what_fails(branch.folder):
            replace_text(branch.folder / MADE_FOR, json.dumps(made_for, indent=1) + "\n")
            workdir.write_config(branch.folder, described)
        # Last, as a workdir that has a checkpoint is taken as made.
        writing.save(branch.folder, state, begun, 1, {branch.stretch.start}).result()


def _check_made_for(folder: Path, made_for: dict[str, Any]) -> None:
    """Raises Mistake if the branch in a workdir was not made for the same as is wanted now."""
    remedy = "give the branches another folder by --output"
    try:
        before = continuing.flatten(json.loads((folder / MADE_FOR).read_text(encoding="utf-8")))
    except (OSError, ValueError, AttributeError):
        raise Mistake(
            f"{folder} holds a run, and no {MADE_FOR} says which branch it is, as one of an "
            f"earlier version of bigbatch, or no branch at all: {remedy}.") from None
    differing = [f"{key}: {old!r} there, {new!r} now"
                 for key, old, new in continuing.unlike(before, continuing.flatten(made_for))]
    if differing:
        raise Mistake(f"{folder} holds another branch ({'; '.join(differing)}): {remedy}, or give "
                      "the flags that the branches in it were made with.")
