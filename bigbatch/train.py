"""A run from its first line to its last.

`train_and_evaluate` calls `set_goal` (what the config asks for), `begin` (opens everything, finds
where the run stands) and `loop.loop` (the updates), and reports the end.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from bigbatch.config import (
    check,
    make_phases,
    noise_layout,
    noise_window,
    tokens_per_example,
)
from bigbatch.config.course import Course, check_steering, due_ends, make_course, make_steering
from bigbatch.data.feed import Feed, open_feed
from bigbatch.job import chips, preemption, processes, signals
from bigbatch.job.devices import make_mesh, pin_options
from bigbatch.loop import NotFinite, Preempted, Run, loop
from bigbatch.mistake import Mistake
from bigbatch.programs.dispatch import as_rates, measure, take_update
from bigbatch.programs.programs import Programs
from bigbatch.schedule.deciding import Steering
from bigbatch.storage import bucket, bucket_programs, checkpoint, continuing, logs, workdir, writing
from bigbatch.storage.continuing import Position
from bigbatch.storage.saves import Saves
from bigbatch.tasks import contract, measures
from bigbatch.update import (
    evaluation,
    initial_weights,
    network,
    noise,
    own_optimizer,
    sharding,
    update,
)
from bigbatch.watching import profiling, progress
from bigbatch.watching.clock import Clock
from bigbatch.watching.log import Log

__all__ = ["NotFinite", "Preempted", "StoppedAfterPhase", "begin", "set_goal", "train_and_evaluate"]


class StoppedAfterPhase(Exception):
    """The run stands, saved, at the end of the phase that `stop_after_phase` names, or past it."""


def train_and_evaluate(
    config: ConfigDict, workdir_path: str | Path, stop_after_phase: str = "", show: bool = True,
    profile: str = "",
) -> update.State:
    """Trains the network of `config`, or continues its training, to the end of the last phase.

    Args:
        config: see `config.base_config`.
        workdir_path: a folder, or gs://bucket/path, for logs and checkpoints. If it holds a run,
            that run is continued from its newest whole checkpoint.
        stop_after_phase: the name or number of a phase to stop after; "" for none.
        show: whether to print progress.
        profile: START:COUNT, the updates to trace (see `profiling`); "" for none.

    Returns:
        The state after the last update: parameters, batch statistics and optimizer state.

    Raises:
        Mistake: if the config, the workdir or the data are wrong. All is checked before anything is
            compiled or logged, except streamed images, each of which is checked when it is read.
        StoppedAfterPhase, Preempted: if the run stopped early, after saving a checkpoint.
        NotFinite: if training diverged; the text names the update.
        WriteError: if a checkpoint or a log could not be written.
    """
    signals.heard_here()
    goal = set_goal(config, stop_after_phase, profile)
    with contextlib.ExitStack() as at_end:
        run, at, state = begin(goal, workdir_path, show, at_end)
        state, at = loop(run, at, state)
        run.log.time_shares(at)
        if stop_after_phase and at.examples_seen < goal.course.phases[-1].end_example:
            last_phase = goal.course.phases[goal.course.last]
            how = f"stopped after phase {last_phase.name}"
            if at.examples_seen > last_phase.end_example:  # it began past it
                how = (f"--stop_after_phase: phase {last_phase.name} is over since example "
                       f"{last_phase.end_example}, so nothing was trained; the run is")
            run.log.line(f"{how} at example {at.examples_seen}")
            raise StoppedAfterPhase(f"{how} at example {at.examples_seen}")
        run.log.line(f"finished: {at.updates} updates, {at.examples_seen} examples")
        return state


# --- begin ----------------------------------------------------------------------------------------
class Goal(NamedTuple):
    """What a run is to do. It follows from config, flags and devices, and not from the workdir."""

    config: ConfigDict
    course: Course  # with every batch that comes, or (where the run decides) that can come
    steering: Steering | None  # see `config.course.make_steering`
    span: profiling.Span | None  # the updates to trace; None for none
    mesh: Mesh
    net: network.Network
    task: contract.Task


def set_goal(config: ConfigDict, stop_after_phase: str, profile: str) -> Goal:
    """Checks all that can be checked without the workdir and the data, and writes nothing.

    Args:
        config: see `config.base_config`.
        stop_after_phase: see `train_and_evaluate`.
        profile: see there.

    Raises:
        Mistake: if a config value, a phase name, the span of updates, the network or an optimizer
            of the user's own is wrong.
    """
    check(config)
    pin_options(config.dtype)
    mesh = make_mesh(shards=config.sharding.shards)
    course, steering = make_course(config, None, mesh.size, stop_after_phase), make_steering(config)
    last = course.phases[-1]
    span = profiling.parse(profile, last.start_update + last.updates)
    net = network.build(config)
    own_optimizer.check(config, net.params)
    if steering:
        check_steering(steering, net.copied_for, stop_after_phase)
    return Goal(config, course, steering, span, mesh, net, contract.task_of(config))


def begin(
    goal: Goal, workdir_path: str | Path, show: bool, at_end: contextlib.ExitStack
) -> tuple[Run, Position, update.State]:
    """Opens the workdir, the data and the logs, and finds the position of the run.

    Args:
        goal: what the run is to do.
        workdir_path: see `train_and_evaluate`.
        show: see there.
        at_end: receives a callback for each thing that has to be closed at the end of the run.

    Returns:
        All that the loop needs, the position, and the state at this position. The state is on the
        devices. Of a new run only its shapes are returned, as its initial values are computed by a
        program that `Programs.begin` compiles.

    Raises:
        Mistake: see `train_and_evaluate`.
    """
    config, mesh = goal.config, goal.mesh
    folder, mirror = at_end.enter_context(bucket.opened(workdir_path))
    newest = _find_newest(folder, mirror, at_end)
    at = continuing.position_of(newest.run)
    course = goal.course
    if goal.steering:
        course = make_course(config, at.growth.decisions, mesh.size)
    allowed_changes = _check_changes(config, course, newest, folder, workdir_path)
    phases, layouts = course.to_run(at.examples_seen)

    # The data and the state, on the devices.
    state = update.abstract_state(config, goal.net, mesh)
    writing.make_room(state)
    begin_with = {} if newest.path else initial_weights.read(config, state)
    feed = open_feed(
        config, contract.fields_of(config, goal.task), contract.load(config, goal.task), mesh,
        phases, layouts, at.examples_seen, _evaluations(config, course, at),
        due_ends(config, course, at.examples_seen, "noise.every_epochs"))
    at_end.callback(feed.close)
    about = contract.about(config, goal.task)
    if newest.path:
        state = checkpoint.restore(newest.path, state, mirror)
    # Until here a signal ends the process at once: loading may take long, and leaves nothing to
    # save.
    watch = preemption.Watch()
    at_end.callback(watch.close)

    # Checkpoints and logs. The logs lose the events after the position.
    describe = _describing(config)
    write_config = partial(_write_config, describe, folder, mirror)
    saves = Saves(
        folder, mirror, describe, config.keep_checkpoints,
        {phase.end_example for phase in course.phases}, at.examples_seen)
    peak = chips.peak_flops(mesh.devices.flat[0].device_kind, config.dtype)
    clock = Clock(peak and peak * mesh.size, at.updates)
    log = _open_log(
        goal, course, folder, mirror, saves, write_config, at, show, clock, feed, about, at_end)
    for text in [*newest.faults, *(f"changed: {change}" for change in allowed_changes),
                 *sharding.notes(config, goal.net.params, mesh)]:
        log.notice(text, at.examples_seen)
    if newest.path:
        log.line(f"continuing at {log.position(at.examples_seen)}, update {at.updates}")
    log.line(f"{mesh.size} x {mesh.devices.flat[0].device_kind}")
    tracer = profiling.Tracer(goal.span, at.updates, folder, workdir_path,
                              lambda text: log.notice(text, at.examples_seen))
    at_end.callback(tracer.close)

    if goal.steering and phases:  # and those of every batch to which it may grow
        layouts += tuple(
            layout for phase, layout in zip(goal.course.phases, goal.course.layouts, strict=True)
            if phase.batch_size > phases[-1].batch_size)
    programs = Programs(
        config, goal.net, mesh, layouts, feed.resident, feed.test, peak is not None, begin_with,
        at_end.enter_context(bucket_programs.opened(mirror, jax.process_index() == 0)),
        noise_layout(config, mesh.size))
    run = _make_run(goal, course, state, programs, feed, log, saves, write_config, watch, tracer)
    return run, at, state


def _make_run(
    goal: Goal, course: Course, state: update.State, programs: Programs, feed: Feed, log: Log,
    saves: Saves, write_config: Callable[[Position], None], watch: preemption.Watch,
    tracer: profiling.Tracer,
) -> Run:
    """What the loop needs, of what `begin` has opened."""
    config, ghosts = goal.config, noise_layout(goal.config, goal.mesh.size)

    def evaluate(state: update.State) -> dict[str, float]:
        networks = evaluation.networks_of(state._asdict(), watch.before_reduction)
        return evaluation.whole_test_set(
            config, programs.evaluate(), networks, feed, watch.before_reduction)

    def measure_ghosts(
        calls: Sequence[Callable], state: update.State, sums: update.Sums | None, position: int
    ) -> tuple[update.Sums, noise.Measured]:
        return measure(calls, state, sums, feed.resident, feed.coming(ghosts, position))

    to_arrays = partial(as_rates, goal.mesh, jax.tree.leaves(state.params)[0].dtype)
    return Run(
        course=course,
        steering=goal.steering,
        replan=partial(_replan, goal, feed, saves, log, write_config),
        programs=programs,
        take_update=partial(
            take_update, before_reduction=watch.before_reduction,
            # A pass over parameters in pieces gathers them, so it needs all processes.
            before_pass=watch.before_reduction if config.sharding.parameters else watch.poll,
            started=log.clock.update_started, landed=log.clock.update_landed),
        evaluate=evaluate,
        results=partial(measures.results, config, goal.task, before="train_"),
        measure=measure_ghosts,
        noise_window=noise_window(config),
        feed=feed,
        as_rates=lru_cache(maxsize=1)(to_arrays),  # constant but in a warm-up
        examples=config.data.train_examples,
        tokens=tokens_per_example(config),
        log=log,
        saves=saves,
        watch=watch,
        tracer=tracer,
    )


def _find_newest(
    folder: Path, mirror: bucket.Mirror | None, at_end: contextlib.ExitStack
) -> checkpoint.Found:
    """Locks the workdir for this job and finds its newest whole checkpoint.

    Only the first process locks it. All search together, so that all start from the same one.
    """
    def lock() -> None:
        at_end.enter_context(mirror.held() if mirror else workdir.open_workdir(folder))

    processes.decided_by_first("run", lock)
    return checkpoint.find_newest(folder, mirror, in_job=True)


def _check_changes(
    config: ConfigDict, course: Course, newest: checkpoint.Found, folder: Path,
    workdir_path: str | Path,
) -> list[str]:
    """The differences between the saved config and the present one, all of them allowed.

    Raises:
        Mistake: if there is a difference that is not allowed, or no checkpoint but a log that a
            start may not replace; see `continuing`.
    """
    if not newest.path:  # only the first process has the logs, where they are in a bucket
        processes.decided_by_first(
            "anew", partial(continuing.check_anew, folder, workdir_path, config))
        return []
    refused, allowed = continuing.changes(newest.run, config, course.phases)
    if refused:
        raise Mistake(
            f"{workdir_path} holds a run of another config, which this config cannot continue: "
            f"{'; '.join(refused)}. Give another --workdir, or set these keys back."
        )
    return allowed


def _evaluations(config: ConfigDict, course: Course, at: Position) -> Iterator[int]:
    """The examples seen at each evaluation to come. A pending evaluation precedes any update."""
    if at.pending_evaluation:
        yield at.examples_seen
    yield from due_ends(config, course, at.examples_seen, "eval_every_epochs")


def _describing(config: ConfigDict) -> Callable[[Position], dict[str, Any]]:
    """Makes the function from a position to the content of run.json."""
    phases = lru_cache(maxsize=1)(partial(make_phases, config))  # of decisions
    return lambda at: continuing.describe_run(config, phases(at.growth.decisions), at)


def _write_config(
    describe: Callable[[Position], Mapping[str, Any]], folder: Path, mirror: bucket.Mirror | None,
    at: Position,
) -> None:
    """Writes config.json, in the first process; raises WriteError if it cannot be written."""
    if jax.process_index() == 0:
        with writing.names_what_fails(folder, mirror):
            workdir.write_config(folder, describe(at))


def _replan(
    goal: Goal, feed: Feed, saves: Saves, log: Log, write_config: Callable[[Position], None],
    at: Position,
) -> Course:
    """The course after a decision, which feed, saves, log and config.json follow from now on."""
    config = goal.config
    course = make_course(config, at.growth.decisions, goal.mesh.size)
    feed.follow(*course.to_run(at.examples_seen), at.examples_seen,
                _evaluations(config, course, at),
                due_ends(config, course, at.examples_seen, "noise.every_epochs"))
    saves.boundaries = {phase.end_example for phase in course.phases}
    log.follow(course.phases)
    write_config(at)
    return course


def _open_log(
    goal: Goal, course: Course, folder: Path, mirror: bucket.Mirror | None, saves: Saves,
    write_config: Callable[[Position], None], at: Position, show: bool, clock: Clock, feed: Feed,
    about: Mapping[str, Any],
    at_end: contextlib.ExitStack,
) -> Log:
    """Opens the logs of the run. Only the first process writes to them.

    `about` is what the task says of its data; the other arguments are things that `begin` has.
    """
    config, writes = goal.config, jax.process_index() == 0
    names_what_fails = partial(writing.names_what_fails, folder, mirror)
    write_board, damaged = None, []
    if writes:
        if mirror:
            at_end.enter_context(writing.sending_last_logs(folder, mirror, saves.pending))
        write_config(at)
        # The event of a pending evaluation is written again, at this same position.
        last = at.examples_seen - (at.pending_evaluation is not None)
        with names_what_fails():
            damaged = logs.cut_events(folder / "metrics.jsonl", last)
            logs.cut_half_line(folder / "timing.jsonl")
        if config.tensorboard:
            from bigbatch.watching import tensorboard  # its docstring says why not above

            board = tensorboard.open_board(folder, last, mirror.list_boards() if mirror else ())
            at_end.callback(tensorboard.close_board, board)
            write_board = partial(tensorboard.write_board, board)
    display = progress.Display(
        course.phases, config.data.train_examples, tokens_per_example(config), show and writes)
    at_end.callback(display.close)

    def write(kind: str, event: Mapping[str, Any]) -> None:
        if not writes:
            return
        with names_what_fails(f"{kind}.jsonl"):
            logs.append_event(folder / f"{kind}.jsonl", event)
        if write_board and kind == "metrics":
            with names_what_fails("tensorboard"):
                write_board(event)

    log = Log(write, display, clock, config.data.train_examples,
              (lambda: feed.skipped) if config.data.streaming else None)
    log.timing(
        "start", at.examples_seen, devices=goal.mesh.size,
        device_kind=goal.mesh.devices.flat[0].device_kind, jax=jax.__version__, time=time.time(),
        **({"data": about} if about else {}))
    for text in damaged:
        log.notice(mirror.named(text) if mirror else text, at.examples_seen)
    return log
