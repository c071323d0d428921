"""A run from its first line to its last.

`train_and_evaluate` calls `set_goal` (what the config asks for), `begin` (opens everything, finds
where the run stands) and `loop` (the updates), and reports the end.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.profiler import StepTraceAnnotation
from jax.sharding import Mesh
from ml_collections import ConfigDict

from bigbatch import schedule
from bigbatch.config import (
    check,
    evaluations,
    make_due,
    make_layouts,
    make_phases,
    make_recipe,
    noise_layout,
    noise_window,
    tokens_per_example,
)
from bigbatch.data.feed import Feed, open_feed
from bigbatch.job import chips, preemption, processes
from bigbatch.job.devices import make_mesh, pin_options
from bigbatch.mistake import Mistake
from bigbatch.programs.dispatch import as_rates, measure, take_update
from bigbatch.programs.programs import Programs, Ready
from bigbatch.schedule import Phase
from bigbatch.schedule.layout import Layout
from bigbatch.schedule.rates import Rates
from bigbatch.storage import bucket, bucket_programs, checkpoint, continuing, logs, workdir
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


class Preempted(Exception):
    """The run has stopped on a signal (see `preemption`); the next start continues from there."""


class StoppedAfterPhase(Exception):
    """The run stands, saved, at the end of the phase that `stop_after_phase` names, or past it."""


class NotFinite(ArithmeticError):
    """Training diverged: the loss or a parameter is no longer a finite number."""


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
    goal = set_goal(config, stop_after_phase, profile)
    with contextlib.ExitStack() as at_end:
        run, at, state = begin(goal, workdir_path, show, at_end)
        state, at = loop(run, at, state)
        run.log.time_shares(at)
        if at.examples_seen < goal.phases[-1].end_example:
            how = f"stopped after phase {goal.last_phase.name}"
            if at.examples_seen > goal.last_phase.end_example:  # it began past it
                how = (f"--stop_after_phase: phase {goal.last_phase.name} is over since example "
                       f"{goal.last_phase.end_example}, so nothing was trained; the run is")
            run.log.line(f"{how} at example {at.examples_seen}")
            raise StoppedAfterPhase(f"{how} at example {at.examples_seen}")
        run.log.line(f"finished: {at.updates} updates, {at.examples_seen} examples")
        return state


# --- begin ----------------------------------------------------------------------------------------
class Goal(NamedTuple):
    """What a run is to do. It follows from config, flags and devices, and not from the workdir."""

    config: ConfigDict
    phases: tuple[Phase, ...]
    last_phase: Phase  # the phase to stop after: the last one, or that of --stop_after_phase
    span: profiling.Span | None  # the updates to trace; None for none
    mesh: Mesh
    layouts: list[Layout]  # one for each phase
    net: network.Network
    task: contract.Task


class Run(NamedTuple):
    """All that `loop` needs beside the state and the position."""

    all_phases: tuple[Phase, ...]
    phases: tuple[Phase, ...]  # the phases still to run; the first may be under way
    layouts: tuple[Layout, ...]  # one for each of `phases`
    programs: Programs
    take_update: Callable  # see `dispatch.take_update`
    evaluate: Callable[[update.State], dict[str, float]]  # see `whole_test_set`
    results: Callable[[Mapping[str, Any]], dict[str, float]]  # of the means of an update
    # (programs, state, sums, position) -> sums, what was measured; see `dispatch.measure`
    measure: Callable[..., tuple[update.Sums, noise.Measured]]
    noise_window: int  # see `config.noise_window`
    feed: Feed
    # phase, examples seen before and after -> the rates of that update
    rates_at: Callable[[Phase, int, int], Rates]
    as_rates: Callable[[Rates], Rates]  # as arrays on the devices
    is_due: Callable[[str, int, int], bool]  # see `schedule.due.make_due`
    examples: int  # N, the examples of an epoch
    tokens: int | None  # of an example, if the task has tokens
    log: Log
    saves: Saves
    watch: preemption.Watch
    tracer: profiling.Tracer


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
    phases = make_phases(config)
    last_phase = phases[-1]
    if stop_after_phase:
        last_phase = schedule.find_phase(phases, stop_after_phase, "--stop_after_phase")
    pin_options(config.dtype)
    span = profiling.parse(profile, phases[-1].start_update + phases[-1].updates)
    mesh, net = make_mesh(shards=config.sharding.shards), network.build(config)
    own_optimizer.check(config, net.params)
    return Goal(config, phases, last_phase, span, mesh, make_layouts(config, phases, mesh.size),
                net, contract.task_of(config))


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
    watch = preemption.Watch()
    at_end.callback(watch.close)
    allowed_changes = _check_changes(goal, newest, workdir_path)
    at = continuing.position_of(newest.run)
    current = schedule.phase_at(goal.phases, at.examples_seen)
    phases = goal.phases[current.index : goal.last_phase.index + 1] if current else ()
    layouts = tuple(goal.layouts[phase.index] for phase in phases)
    is_due = make_due(config, goal.phases[-1].end_example)

    # The data and the state, on the devices.
    begin_with = {} if newest.path else initial_weights.read(config, goal.net)
    feed = open_feed(
        config, contract.fields_of(config, goal.task), contract.load(config, goal.task), mesh,
        phases, layouts, at.examples_seen, _evaluations(goal, at, phases),
        evaluations(config, phases, at.examples_seen, goal.phases[-1].end_example,
                    "noise.every_epochs"))
    at_end.callback(feed.close)
    state = update.abstract_state(config, goal.net, mesh)
    if newest.path:
        state = checkpoint.restore(newest.path, state, mirror)

    # Checkpoints and logs. The logs lose the events after the position.
    saves = Saves(
        folder, mirror, partial(continuing.describe_run, config, goal.phases),
        config.keep_checkpoints, {phase.end_example for phase in goal.phases}, at.examples_seen)
    peak = chips.peak_flops(mesh.devices.flat[0].device_kind, config.dtype)
    clock = Clock(peak and peak * mesh.size, at.updates)
    log = _open_log(goal, folder, mirror, saves, at, show, clock, feed, at_end)
    for text in [*newest.faults, *(f"changed: {change}" for change in allowed_changes),
                 *sharding.notes(config, goal.net.params, mesh)]:
        log.notice(text, at.examples_seen)
    if newest.path:
        log.line(f"continuing at epoch {at.examples_seen / config.data.train_examples:.2f}, "
                 f"update {at.updates}")
    log.line(f"{mesh.size} x {mesh.devices.flat[0].device_kind}")
    tracer = profiling.Tracer(goal.span, at.updates, folder, workdir_path,
                              lambda text: log.notice(text, at.examples_seen))
    at_end.callback(tracer.close)

    dtype = jax.tree.leaves(state.params)[0].dtype
    measured = noise_layout(config, mesh.size)
    programs = Programs(
        config, goal.net, mesh, layouts, feed.resident, feed.test, peak is not None, begin_with,
        at_end.enter_context(bucket_programs.opened(mirror, jax.process_index() == 0)), measured)
    run = Run(
        goal.phases, phases, layouts, programs,
        partial(take_update, before_reduction=watch.before_reduction,
                # A pass over parameters in pieces gathers them, so it needs all processes.
                before_pass=watch.before_reduction if config.sharding.parameters else watch.poll,
                started=clock.update_started, landed=clock.update_landed),
        lambda state: evaluation.whole_test_set(
            config, programs.evaluate(),
            evaluation.networks_of(state._asdict(), watch.before_reduction), feed,
            watch.before_reduction),
        partial(measures.results, config, goal.task, before="train_"),
        lambda calls, state, sums, position: measure(
            calls, state, sums, feed.resident, feed.coming(measured, position)),
        noise_window(config), feed,
        partial(schedule.take_rates, make_recipe(config), goal.phases),
        lru_cache(maxsize=1)(partial(as_rates, mesh, dtype)),  # constant but in a warm-up
        is_due, config.data.train_examples, tokens_per_example(config), log, saves, watch, tracer,
    )
    return run, at, state


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
    goal: Goal, newest: checkpoint.Found, workdir_path: str | Path
) -> list[str]:
    """The differences between the saved config and the present one, all of them allowed.

    Raises:
        Mistake: if there is a difference that is not allowed; see `continuing`.
    """
    if not newest.path:
        return []
    refused, allowed = continuing.changes(newest.run, goal.config, goal.phases)
    if refused:
        raise Mistake(
            f"{workdir_path} holds a run of another config, which this config cannot continue: "
            f"{'; '.join(refused)}. Give another --workdir, or set these keys back."
        )
    return allowed


def _evaluations(goal: Goal, at: Position, phases: Sequence[Phase]) -> Iterator[int]:
    """The examples seen at each evaluation to come. A pending evaluation precedes any update."""
    if at.pending_evaluation:
        yield at.examples_seen
    yield from evaluations(goal.config, phases, at.examples_seen, goal.phases[-1].end_example)


def _open_log(
    goal: Goal, folder: Path, mirror: bucket.Mirror | None, saves: Saves, at: Position, show: bool,
    clock: Clock, feed: Feed, at_end: contextlib.ExitStack,
) -> Log:
    """Opens the logs of the run. Only the first process writes to them."""
    config, writing = goal.config, jax.process_index() == 0
    names_what_fails = partial(checkpoint.names_what_fails, folder, mirror)
    write_board, damaged = None, []
    if writing:
        if mirror:
            at_end.enter_context(checkpoint.sending_last_logs(folder, mirror, saves.pending))
        with names_what_fails():
            workdir.write_config(folder, continuing.describe_run(config, goal.phases, at))
            damaged = logs.cut_events(
                folder / "metrics.jsonl", at.examples_seen, at.pending_evaluation is not None)
            logs.cut_half_line(folder / "timing.jsonl")
        if config.tensorboard:
            from bigbatch.watching import tensorboard  # its docstring says why not above

            board = tensorboard.open_board(
                folder, at.examples_seen, mirror.list_boards() if mirror else ())
            at_end.callback(tensorboard.close_board, board)
            write_board = partial(tensorboard.write_board, board)
    display = progress.Display(goal.phases, config.data.train_examples, show and writing)
    at_end.callback(display.close)

    def write(kind: str, event: Mapping[str, Any]) -> None:
        if not writing:
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
        device_kind=goal.mesh.devices.flat[0].device_kind, jax=jax.__version__, time=time.time())
    for text in damaged:
        log.notice(mirror.named(text) if mirror else text, at.examples_seen)
    return log


# --- the loop -------------------------------------------------------------------------------------
class InFlight(NamedTuple):
    """An update that was dispatched. It may still run, and may turn out not to be finite."""

    start: int  # examples seen before the update
    after: Position  # the position after the update
    measured: update.Metrics
    # The line of metrics.jsonl without what was measured; None if no line is due.
    event: dict[str, Any] | None

    def land(self, run: Run) -> tuple[dict[str, Any] | None, Position]:
        """Waits for the update to end.

        Returns:
            The complete line of metrics.jsonl, if it is due, and the position after the update.

        Raises:
            NotFinite: if training diverged in this update, after noting that in timing.jsonl.
            Mistake: if no example of the update counts, in any process of the job.
        """
        with run.log.clock.spent_on("update"):
            finite, measured = jax.device_get((self.measured.finite, self.measured.noise))
            finite = bool(finite)
        if not finite:
            if not self.measured.weight:  # of no example: no divergence
                raise run.feed.none_of_use(f"the update from example {self.start}")
            run.log.diverged(self.after.updates - 1, self.start)
            saved = ("All checkpoints are from before it." if run.saves.newest else
                     "There is no checkpoint from before it.")
            raise NotFinite(
                f"training diverged in update {self.after.updates} (from example {self.start}): "
                f"its loss ({float(self.measured.loss):g}) or a parameter after it is not finite. "
                f"{saved} A lower recipe.learning_rate or a warm-up usually helps."
            )
        added = self.after.examples_seen - self.start, run.noise_window
        smoothed = self.after.noise.after(measured.by_norms, *added)
        run.log.saw_groups(measured.by_groups, measured.groups, *added)
        event = self.event
        if event:
            event = event | run.results(self.measured.means) | noise.line(measured, smoothed)
            run.log.warn_of_noise(event, smoothed.weight)
        return event, self.after._replace(noise=smoothed)


def loop(run: Run, at: Position, state: update.State) -> tuple[update.State, Position]:
    """Trains from the position `at` to the end of the last of `run.phases`.

    An update is dispatched before the metrics of the one before it are read and logged, so that the
    devices do not wait for this. A state is evaluated or saved only after the metrics of its own
    update were read, so a state that is not finite never is.

    Args:
        run: see `begin`.
        at: the position of `state`.
        state: see `begin`.

    Returns:
        The state after the last update, and its position.

    Raises:
        Preempted, NotFinite, WriteError: see `train_and_evaluate`.
        Mistake: if an image cannot be read or decoded.
    """
    log, saves, clock, watch, flight = run.log, run.saves, run.log.clock, run.watch, None
    try:
        log.line("compiling")
        with clock.spent_on("compile"):
            state, sums = run.programs.begin(state, watch)
        if at.pending_evaluation:  # the run was stopped during this evaluation
            log.finished(at.pending_evaluation | _evaluate(run, state))
            at = at._replace(pending_evaluation=None)
        for phase, layout in zip(run.phases, run.layouts, strict=True):
            ready = _enter(run, phase, layout, at)
            for number, (start, end) in enumerate(schedule.spans([phase], at.examples_seen)):
                rates = run.rates_at(phase, start, end)
                run.tracer.before(at.updates + 1, state)
                step = StepTraceAnnotation("update", step_num=at.updates + 1)
                with step, clock.spent_on("update"):
                    state, sums, measured, waited = run.take_update(
                        ready.calls, state, sums, run.feed.resident,
                        run.feed.update(phase, layout, start),
                        run.as_rates(rates),
                        running=flight and flight.measured.finite)
                clock.dispatched(waited)
                if flight:  # the update before this one
                    event, at = flight.land(run)
                    log.finished(event)

                at = Position(end, at.updates + 1, noise=at.noise)
                due = _due(run, phase, start, end)
                flight = InFlight(
                    start, at, measured, _event(run, phase, rates, at) if due.log else None)
                run.tracer.after(at.updates, state)
                if number == 0:  # waits, so that the first update of a phase is timed alone
                    with clock.spent_on("update"):
                        jax.block_until_ready(measured.finite)
                    log.timing(
                        "phase", start, phase=phase.name, compile_seconds=ready.compile_seconds,
                        waited_seconds=ready.waited_seconds, programs=ready.obtained,
                        **clock.first_update())

                if due.noise or due.evaluation or due.save:  # of a state known to be finite
                    (event, at), flight = flight.land(run), None
                    clock.idle()
                    if due.noise:
                        sums, event = _measure(run, state, sums, event)
                    if due.evaluation:
                        at = at._replace(pending_evaluation=event)  # what a stop here would save
                        event |= _evaluate(run, state)
                        at = at._replace(pending_evaluation=None)
                    log.finished(event)
                with clock.spent_on("checkpoint"):
                    saves.raise_failures()
                    if due.save:
                        log.saved(at, saves.start(state, at))
    except (NotFinite, Mistake):  # a Mistake: an image that cannot be read or decoded
        saves.wait()
        raise
    except preemption.Stop:  # all processes stop at this position; `state` is the state there
        _save_last(run, at, state, flight)
        raise Preempted(f"told to stop at example {at.examples_seen}") from None
    with clock.spent_on("checkpoint"):
        saves.wait()
    return state, at


class _Due(NamedTuple):
    """What is to be done after an update."""

    log: bool  # a line of metrics.jsonl
    noise: bool  # a measurement of the noise scale
    evaluation: bool
    save: bool


def _due(run: Run, phase: Phase, start: int, end: int) -> _Due:
    """What is due after the update of `phase` from example `start` to `end`."""
    ends = end == phase.end_example
    measured, evaluation = run.is_due("noise", start, end), run.is_due("eval", start, end)
    return _Due(ends or measured or evaluation or run.is_due("log", start, end),
                measured, evaluation, ends or run.is_due("checkpoint", start, end))


def _event(run: Run, phase: Phase, rates: Rates, after: Position) -> dict[str, Any]:
    """The line of metrics.jsonl for an update, without the metrics that the update returns."""
    tokens = {"tokens_seen": after.examples_seen * run.tokens} if run.tokens else {}
    return {
        "updates": after.updates, "examples_seen": after.examples_seen, **tokens,
        "epoch": after.examples_seen / run.examples, "phase": phase.name,
        "batch_size": phase.batch_size,
        "learning_rate": rates.learning_rate, "momentum": phase.momentum,
        "noise_scale": schedule.noise_scale(
            rates.learning_rate, phase.momentum, run.examples, phase.batch_size),
    }


def _enter(run: Run, phase: Phase, layout: Layout, at: Position) -> Ready:
    """Shows that a phase begins or continues, and returns its programs once they are compiled."""
    run.log.line(progress.describe(phase, run.all_phases))
    with run.log.clock.spent_on("compile"):
        ready = run.programs.wait_for(layout, run.watch, lambda: run.log.notice(
            f"waiting for the compiler: phase {phase.name} is not ready", at.examples_seen))
    run.log.clock.flops = ready.flops
    return ready


def _save_last(run: Run, at: Position, state: update.State, flight: InFlight | None) -> None:
    """Writes down and saves what a run told to stop has come to, unless that is saved already."""
    log, saves = run.log, run.saves
    saves.wait()
    if flight:
        event, at = flight.land(run)
        log.finished(event)
    if at.examples_seen != saves.newest:
        log.saved(at, saves.start(state, at))
    saves.wait()
    log.time_shares(at)
    log.line("told to stop " + (
        f"and saved at example {at.examples_seen}, update {at.updates}" if at.updates else
        "before the first update, so nothing is saved and the run begins anew"))


def _measure(
    run: Run, state: update.State, sums: update.Sums, event: dict[str, Any]
) -> tuple[update.Sums, dict[str, Any]]:
    """Measures the noise scale after the update of `event`, to which it is added.

    No update is counted, and a stop waits: this takes no longer than an update or two.
    """
    with run.log.clock.spent_on("compile"):
        calls = run.programs.measure()
    with run.log.clock.spent_on("evaluation"):
        sums, measured = run.measure(calls, state, sums, event["examples_seen"])
    return sums, event | noise.line_of_ghosts(measured)


def _evaluate(run: Run, state: update.State) -> dict[str, float]:
    with run.log.clock.spent_on("evaluation"):
        return run.evaluate(state)
