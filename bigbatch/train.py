"""The whole story of a run: how it begins, its loop, how it ends."""

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.profiler import StepTraceAnnotation
from jax.sharding import Mesh
from ml_collections import ConfigDict

from bigbatch import schedule
from bigbatch.config import check, make_due, make_layouts, make_phases
from bigbatch.data import feed
from bigbatch.job import chips, preemption, processes
from bigbatch.job.devices import make_mesh, place, replicated
from bigbatch.mistake import Mistake
from bigbatch.programs.dispatch import as_rates, take_update
from bigbatch.programs.programs import Programs, Ready
from bigbatch.schedule import Phase
from bigbatch.schedule.layout import Layout
from bigbatch.storage import bucket, checkpoint, continuing, logs, workdir
from bigbatch.storage.continuing import Position
from bigbatch.storage.saves import Saves
from bigbatch.update import evaluation, network, update
from bigbatch.watching import profiling, progress
from bigbatch.watching.clock import Clock
from bigbatch.watching.log import Log


class Preempted(Exception):
    """The run was told to stop (SIGTERM, Ctrl-C) and did, with a checkpoint."""


class StoppedAfterPhase(Exception):
    """The run stopped where it was asked to, with a checkpoint, before its end."""


class NotFinite(ArithmeticError):
    """The loss or a parameter is no longer a finite number."""


def train_and_evaluate(
    config: ConfigDict, workdir_path: str | Path, stop_after_phase: str = "", show: bool = True,
    profile: str = "",
) -> update.State:
    """Trains what `config` describes in `workdir_path`, from where it stands, to its end.

    Args:
        config: see `config.base_config`.
        workdir_path: a folder, or gs://bucket/path. Logs and checkpoints go there; a run that was
            begun there is continued.
        stop_after_phase: "", or the name or number of a phase to stop after.
        show: whether to print progress.
        profile: "", or START:COUNT, the updates to trace (see `profiling`).

    Returns:
        The state at the end.

    Raises:
        Mistake: for anything in the config or the workdir that cannot be right; nothing has been
            compiled or written to the run's logs then.
        StoppedAfterPhase, Preempted: the run stopped before its end, with a checkpoint.
        NotFinite: naming the update at which training broke down.
        WriteError: if a checkpoint or a log could not be written.
    """
    goal = set_goal(config, stop_after_phase, profile)
    with contextlib.ExitStack() as at_end:
        run, at, state = begin(goal, workdir_path, show, at_end)
        state, at = loop(run, at, state)
        run.log.time_shares(at)
        if at.examples_seen < goal.phases[-1].end_example:
            run.log.line(
                f"stopped after phase {goal.last_phase.name} at example {at.examples_seen}")
            raise StoppedAfterPhase(f"stopped after phase {goal.last_phase.name}")
        run.log.line(f"finished: {at.updates} updates, {at.examples_seen} examples")
        return state


# --- begin ----------------------------------------------------------------------------------------
class Goal(NamedTuple):
    """What a run is to do, as its config says: independent of where it stands."""

    config: ConfigDict
    phases: tuple[Phase, ...]
    last_phase: Phase  # to be run in this start
    span: profiling.Span | None  # the updates to trace
    mesh: Mesh
    layouts: list[Layout]  # of the phases
    net: network.Network


class Run(NamedTuple):
    """What the loop works with."""

    all_phases: tuple[Phase, ...]
    phases: tuple[Phase, ...]  # still to run; the first may be under way
    layouts: tuple[Layout, ...]  # of these
    programs: Programs
    take_update: Callable  # see `dispatch.take_update`
    evaluate: Callable[[update.State], dict[str, float]]
    fed: feed.Feed
    rates: Callable  # (rate, momentum) -> both on the devices
    is_due: Callable[[str, int, int], bool]
    examples: int  # N, of an epoch
    log: Log
    saves: Saves
    watch: preemption.Watch
    tracer: profiling.Tracer


def set_goal(config: ConfigDict, stop_after_phase: str, profile: str) -> Goal:
    """Refuses whatever can be told from the config alone to be wrong, before anything is written.

    Raises:
        Mistake: with what is wrong.
    """
    check(config)
    phases = make_phases(config)
    last_phase = phases[-1]
    if stop_after_phase:
        last_phase = schedule.find_phase(phases, stop_after_phase, "--stop_after_phase")
    if config.dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    span = profiling.parse(profile, phases[-1].start_update + phases[-1].updates)
    mesh = make_mesh()
    return Goal(config, phases, last_phase, span, mesh, make_layouts(config, phases, mesh.size),
                network.build(config))


def begin(
    goal: Goal, workdir_path: str | Path, show: bool, at_end: contextlib.ExitStack
) -> tuple[Run, Position, update.State]:
    """Opens the workdir, the data and the logs, and finds where the run stands.

    Args:
        goal: what to do.
        workdir_path: of the run.
        show: whether to print progress.
        at_end: gets what has to be closed.

    Returns:
        What the loop works with, where the run stands, and the state there: on the devices, or its
        shapes for a new run, whose state is drawn once its programs are lowered.

    Raises:
        Mistake: see `train_and_evaluate`.
    """
    config, mesh = goal.config, goal.mesh
    folder, mirror = at_end.enter_context(bucket.opened(workdir_path))
    found = _find_newest(folder, mirror, at_end)
    watch = preemption.Watch()
    at_end.callback(watch.close)
    allowed_changes = _check_changes(goal, found, workdir_path)
    at = continuing.position_of(found.run)
    now = schedule.phase_at(goal.phases, at.examples_seen)
    phases = goal.phases[now.index : goal.last_phase.index + 1] if now else ()
    layouts = tuple(goal.layouts[phase.index] for phase in phases)
    is_due = make_due(config, goal.phases[-1].end_example)

    # The data and the state, on the devices.
    fed = feed.open_feed(
        config, mesh, phases, layouts, at.examples_seen, _evaluations(at, phases, is_due))
    at_end.callback(fed.close)
    state = update.abstract_state(config, goal.net, mesh)
    if found.path:
        state = checkpoint.restore(folder / found.path, state, mirror)
        state = place(state, replicated(mesh))

    # The checkpoints to come and the logs, these cut back to where the run stands.
    saves = Saves(
        folder, mirror, partial(continuing.describe_run, config, goal.phases),
        config.keep_checkpoints, {phase.end_example for phase in goal.phases}, at.examples_seen)
    peak = chips.peak_flops(mesh.devices.flat[0].device_kind, config.dtype)
    clock = Clock(peak and peak * mesh.size, at.updates)
    log = _open_log(goal, folder, mirror, saves, at, show, clock, fed, at_end)
    for text in [*found.faults, *(f"changed: {change}" for change in allowed_changes)]:
        log.notice(text, at.examples_seen)
    if found.path:
        log.line(f"continuing at epoch {at.examples_seen / config.data.train_examples:.2f}, "
                 f"update {at.updates}")
    log.line(f"{mesh.size} x {mesh.devices.flat[0].device_kind}")
    tracer = profiling.Tracer(goal.span, at.updates, folder, workdir_path,
                              lambda text: log.notice(text, at.examples_seen))
    at_end.callback(tracer.close)

    dtype = jax.tree.leaves(state.params)[0].dtype
    programs = Programs(
        config, goal.net, mesh, layouts, fed.resident, fed.test, counted=peak is not None)
    run = Run(
        goal.phases, phases, layouts, programs,
        partial(take_update, before_pass=watch.poll, before_reduction=watch.before_reduction),
        lambda state: evaluation.whole_test_set(
            programs.evaluate(), state.params, state.batch_stats, fed, watch.before_reduction),
        fed,
        lru_cache(maxsize=1)(partial(as_rates, mesh, dtype)),  # the same for most of a phase
        is_due, config.data.train_examples, log, saves, watch, tracer,
    )
    return run, at, state


def _find_newest(
    folder: Path, mirror: bucket.Mirror | None, at_end: contextlib.ExitStack
) -> checkpoint.Found:
    """Takes the workdir for this job, and finds its newest whole checkpoint.

    The first process looks, so that all agree.
    """
    def open_run() -> list[Any]:
        at_end.enter_context(mirror.held() if mirror else workdir.open_workdir(folder))
        path, run, faults = checkpoint.find_newest(folder, mirror)
        return [path and str(path.relative_to(folder)), run, faults]

    return checkpoint.Found(*processes.decided_by_first("run", open_run))


def _check_changes(
    goal: Goal, found: checkpoint.Found, workdir_path: str | Path
) -> list[str]:
    """What differs from the saved run and may.

    Raises:
        Mistake: if something differs that may not.
    """
    if not found.path:
        return []
    refused, allowed = continuing.changes(found.run, goal.config, goal.phases)
    if refused:
        raise Mistake(
            f"{workdir_path} holds a run of another config, which this cannot continue: "
            f"{'; '.join(refused)}. Give this one another --workdir, or set the keys back."
        )
    return allowed


def _evaluations(at: Position, phases: Sequence[Phase], is_due: Callable) -> list[int]:
    """The examples seen at each evaluation still to come; a pending one comes before any update."""
    pending = [at.examples_seen] if at.pending_evaluation else []
    return pending + [end for start, end in schedule.spans(phases, at.examples_seen)
                      if is_due("eval", start, end)]


def _open_log(
    goal: Goal, folder: Path, mirror: bucket.Mirror | None, saves: Saves, at: Position, show: bool,
    clock: Clock, fed: feed.Feed, at_end: contextlib.ExitStack,
) -> Log:
    """The logs of the run, of which the first process alone writes any."""
    config, writing = goal.config, jax.process_index() == 0
    names_what_fails = partial(checkpoint.names_what_fails, folder, mirror)
    write_board = None
    if writing:
        if mirror:
            at_end.enter_context(checkpoint.sending_last_logs(folder, mirror, saves.pending))
        with names_what_fails():
            workdir.write_config(folder, continuing.describe_run(config, goal.phases, at))
            logs.cut_events(
                folder / "metrics.jsonl", at.examples_seen, at.pending_evaluation is not None)
            logs.cut_half_line(folder / "timing.jsonl")
        if config.tensorboard:
            from bigbatch.watching import tensorboard  # see there why not above

            board = tensorboard.open_board(folder, at.examples_seen)
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
              (lambda: fed.skipped) if config.data.streaming else None)
    log.timing(
        "start", at.examples_seen, devices=goal.mesh.size,
        device_kind=goal.mesh.devices.flat[0].device_kind, jax=jax.__version__, time=time.time())
    return log


# --- the loop -------------------------------------------------------------------------------------
class InFlight(NamedTuple):
    """An update that was dispatched and is not yet known to have ended well."""

    start: int  # its first example
    after: Position  # where the run stands once it has ended
    measured: update.Metrics
    # Its line of metrics.jsonl but for what was measured; None where none is due.
    event: dict[str, Any] | None

    def land(self, log: Log) -> dict[str, Any] | None:
        """Waits until the update has ended; its event, complete.

        Raises:
            NotFinite: if training broke down in it, which timing.jsonl then says.
        """
        with log.clock.spent_on("update"):
            finite = bool(self.measured.finite)
        if not finite:
            log.diverged(self.after.updates - 1, self.start)
            raise NotFinite(
                f"update {self.after.updates} (from example {self.start}) left a loss of "
                f"{float(self.measured.loss):g} and parameters that are not all finite; the last "
                "checkpoint is from before it. A lower recipe.learning_rate or a warm-up usually "
                "helps."
            )
        return self.event and self.event | {
            "train_loss": float(self.measured.loss),
            "train_accuracy": float(self.measured.accuracy),
        }


def loop(run: Run, at: Position, state: update.State) -> tuple[update.State, Position]:
    """Trains from `at` to the end of the last phase of `run`. What is due follows from examples.

    One update is in flight: while it runs, the one before lands and is written down. A state is
    evaluated or saved only when its own update has landed: one that is not finite never is.
    """
    log, saves, clock, watch, flight = run.log, run.saves, run.log.clock, run.watch, None
    try:
        log.line("compiling")
        with clock.spent_on("compile"):
            state, sums = run.programs.begin(state, watch)
        if at.pending_evaluation:  # the last start was stopped inside it
            log.finished(at.pending_evaluation | _evaluate(run, state))
            at = at._replace(pending_evaluation=None)
        for phase, layout in zip(run.phases, run.layouts, strict=True):
            ready = _enter(run, phase, layout, at)
            for number, (start, end) in enumerate(schedule.spans([phase], at.examples_seen)):
                rate = schedule.learning_rate_at(phase, start)
                run.tracer.before(at.updates + 1, state)
                step = StepTraceAnnotation("update", step_num=at.updates + 1)
                with step, clock.spent_on("update"):
                    state, sums, measured, waited = run.take_update(
                        ready.calls, state, sums, run.fed.resident,
                        run.fed.update(phase, layout, start),
                        run.rates(rate, phase.momentum),
                        running=flight and flight.measured.loss)
                clock.dispatched(waited)
                if flight:  # it has ended, or does while this one runs
                    log.finished(flight.land(log))

                at = Position(end, at.updates + 1)
                due = _due(run, phase, start, end)
                flight = InFlight(
                    start, at, measured, _event(run, phase, rate, at) if due.log else None)
                run.tracer.after(at.updates, state)
                if number == 0:  # the one wait in a phase: for its first update, to know its time
                    flight.land(log)
                    log.timing(
                        "phase", start, phase=phase.name, compile_seconds=ready.compile_seconds,
                        waited_seconds=ready.waited_seconds, **clock.first_update())

                if due.evaluation or due.save:  # nothing may be in flight
                    event, flight = flight.land(log), None
                    clock.idle()
                    if due.evaluation:
                        at = at._replace(pending_evaluation=event)  # if it is stopped inside
                        event |= _evaluate(run, state)
                        at = at._replace(pending_evaluation=None)
                    log.finished(event)
                with clock.spent_on("checkpoint"):
                    saves.raise_failures()
                    if due.save:
                        log.saved(at, saves.start(state, at))
    except (NotFinite, Mistake):  # the latter from an image that cannot be decoded
        saves.wait()
        raise
    except preemption.Stop:  # agreed by all processes; `state` belongs to `at`
        _save_last(run, at, state, flight)
        raise Preempted(f"told to stop at example {at.examples_seen}") from None
    with clock.spent_on("checkpoint"):
        saves.wait()
    return state, at


class _Due(NamedTuple):
    """What an update brings with it."""

    log: bool
    evaluation: bool
    save: bool


def _due(run: Run, phase: Phase, start: int, end: int) -> _Due:
    """What is due after the update of `phase` from example `start` to `end`."""
    ends = end == phase.end_example
    evaluation = run.is_due("eval", start, end)
    return _Due(ends or evaluation or run.is_due("log", start, end), evaluation,
                ends or run.is_due("checkpoint", start, end))


def _event(run: Run, phase: Phase, rate: float, after: Position) -> dict[str, Any]:
    """The line of metrics.jsonl on an update, as far as it is known before the update has ended."""
    return {
        "updates": after.updates, "examples_seen": after.examples_seen,
        "epoch": after.examples_seen / run.examples, "phase": phase.name,
        "batch_size": phase.batch_size, "learning_rate": rate, "momentum": phase.momentum,
        "noise_scale": schedule.noise_scale(rate, phase.momentum, run.examples, phase.batch_size),
    }


def _enter(run: Run, phase: Phase, layout: Layout, at: Position) -> Ready:
    """The programs of a phase that begins, or goes on; waits for the compiler where it has to."""
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
        log.finished(flight.land(log))
    if at.examples_seen != saves.newest:
        log.saved(at, saves.start(state, at))
    saves.wait()
    log.time_shares(at)
    log.line(f"told to stop: saved at example {at.examples_seen}, update {at.updates}")


def _evaluate(run: Run, state: update.State) -> dict[str, float]:
    with run.log.clock.spent_on("evaluation"):
        return run.evaluate(state)
