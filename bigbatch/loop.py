"""The updates of a run, and what is done between them: logs, measurements, evaluations, saves.

`train.begin` gives it all that it needs, as a `Run`.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
from jax.profiler import StepTraceAnnotation

from bigbatch import schedule
from bigbatch.config.course import Course
from bigbatch.data.feed import Feed
from bigbatch.job import preemption
from bigbatch.mistake import Mistake
from bigbatch.programs.programs import Programs, Ready
from bigbatch.schedule import Phase
from bigbatch.schedule.deciding import Steering
from bigbatch.schedule.rates import Rates
from bigbatch.storage.continuing import Position
from bigbatch.storage.saves import Saves
from bigbatch.update import noise, update
from bigbatch.watching import profiling, progress
from bigbatch.watching.log import Log


class Preempted(Exception):
    """The run has stopped on a signal (see `preemption`); the next start continues from there."""


class NotFinite(ArithmeticError):
    """Training diverged: the loss or a parameter is no longer a finite number."""


class Run(NamedTuple):
    """All that `loop` needs beside the state and the position."""

    course: Course  # as it is known at the start
    steering: Steering | None  # None where the course does not change on the way
    replan: Callable[[Position], Course]  # the course after a decision; see `train.begin`
    programs: Programs
    take_update: Callable  # see `dispatch.take_update`
    evaluate: Callable[[update.State], dict[str, float]]  # see `whole_test_set`
    results: Callable[[Mapping[str, Any]], dict[str, float]]  # of the means of an update
    # (programs, state, sums, position) -> sums, what was measured; see `dispatch.measure`
    measure: Callable[..., tuple[update.Sums, noise.Measured]]
    noise_window: int  # see `config.noise_window`
    feed: Feed
    as_rates: Callable[[Rates], Rates]  # as arrays on the devices
    examples: int  # N, the examples of an epoch
    tokens: int | None  # of an example, if the task has tokens
    log: Log
    saves: Saves
    watch: preemption.Watch
    tracer: profiling.Tracer


class InFlight(NamedTuple):
    """An update that was dispatched. It may still run, and may turn out not to be finite."""

    start: int  # examples seen before the update
    after: Position  # the position after the update
    metrics: update.Metrics
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
            finite, measured = jax.device_get((self.metrics.finite, self.metrics.noise))
            finite = bool(finite)
        if not finite:
            if not self.metrics.weight:  # of no example: no divergence
                raise run.feed.none_of_use(f"the update from example {self.start}")
            run.log.diverged(self.after.updates - 1, self.start)
            saved = ("All checkpoints are from before it." if run.saves.newest else
                     "There is no checkpoint from before it.")
            raise NotFinite(
                f"training diverged in update {self.after.updates} (from example {self.start}): "
                f"its loss ({float(self.metrics.loss):g}) or a parameter after it is not finite. "
                f"{saved} A lower recipe.learning_rate or a warm-up usually helps."
            )
        added = self.after.examples_seen - self.start, run.noise_window
        smoothed, growth = self.after.noise.after(measured.by_norms, *added), self.after.growth
        if run.steering:
            growth = growth.after_update(float(self.metrics.loss), *added)
        run.log.saw_groups(measured.by_groups, measured.groups, *added)
        event = self.event
        if event:
            event = event | run.results(self.metrics.means) | noise.line(measured, smoothed)
            run.log.warn_of_noise(event, smoothed.weight)
        return event, self.after._replace(noise=smoothed, growth=growth)


def loop(run: Run, at: Position, state: update.State) -> tuple[update.State, Position]:
    """Trains from the position `at` to the end of the run's course.

    An update is dispatched before the metrics of the one before it are read and logged, so that the
    devices do not wait for this. A state is evaluated or saved only after the metrics of its own
    update were read, so a state that is not finite never is.

    Args:
        run: see `train.begin`.
        at: the position of `state`.
        state: see `train.begin`.

    Returns:
        The state after the last update, and its position.

    Raises:
        Preempted, NotFinite, WriteError: see `train.train_and_evaluate`.
        Mistake: if an image cannot be read or decoded.
    """
    log, saves, clock, course, flight = run.log, run.saves, run.log.clock, run.course, None
    try:
        state, sums, at = _start(run, at, state)
        while phase := course.phase_at(at.examples_seen):
            layout = course.layouts[phase.index]
            ready = _enter(run, course, phase, at)
            for number, (start, end) in enumerate(schedule.spans([phase], at.examples_seen)):
                rates = course.rates_at(phase, start, end)
                state, sums, metrics = _dispatch(
                    run, ready, state, sums, run.feed.update(phase, layout, start), rates,
                    at.updates + 1, flight)
                if flight:  # the update before this one
                    event, at = flight.land(run)
                    log.finished(event)

                at = at._replace(examples_seen=end, updates=at.updates + 1)
                due = _due(run, course, phase, start, end)
                flight = InFlight(
                    start, at, metrics, _event(run, phase, rates, at) if due.log else None)
                run.tracer.after(at.updates, state)
                if number == 0:
                    _time_alone(run, phase, ready, flight)
                before = at.growth.decisions
                if due.of_the_state:
                    (event, at), flight = flight.land(run), None
                    clock.idle()
                    if due.noise:
                        sums, event, at = _measure(run, state, sums, event, at)
                    if due.decision:
                        event, at = _decide(run, event, at)
                    if due.evaluation:
                        at = at._replace(pending_evaluation=event)  # what a stop here would save
                        event |= _evaluate(run, state)
                        at = at._replace(pending_evaluation=None)
                    log.finished(event)
                with clock.spent_on("checkpoint"):
                    saves.raise_failures()
                    if due.save or at.growth.decisions != before:
                        log.saved(at, saves.start(state, at))
                if at.growth.decisions != before:
                    course = run.replan(at)
                    break
    except (NotFinite, Mistake):  # a Mistake: an image that cannot be read or decoded
        saves.wait()
        raise
    except preemption.Stop:  # all processes stop at this position; `state` is the state there
        _save_last(run, at, state, flight)
        raise Preempted(f"told to stop at example {at.examples_seen}") from None
    with clock.spent_on("checkpoint"):
        saves.wait()
    return state, at


def _start(
    run: Run, at: Position, state: update.State
) -> tuple[update.State, update.Sums | None, Position]:
    """Compiles what the run begins with, and makes up for an evaluation that a stop cut short."""
    run.log.line("compiling")
    with run.log.clock.spent_on("compile"):
        state, sums = run.programs.begin(state, run.watch)
    if at.pending_evaluation:
        run.log.finished(at.pending_evaluation | _evaluate(run, state))
        at = at._replace(pending_evaluation=None)
    return state, sums, at


def _dispatch(
    run: Run, ready: Ready, state: update.State, sums: update.Sums | None,
    batches: Iterator[Mapping], rates: Rates, number: int, before: InFlight | None,
) -> tuple[update.State, update.Sums | None, update.Metrics]:
    """Dispatches the update of this number, while the one before it may still run."""
    run.tracer.before(number, state)
    with StepTraceAnnotation("update", step_num=number), run.log.clock.spent_on("update"):
        state, sums, metrics, waited = run.take_update(
            ready.calls, state, sums, run.feed.resident, batches, run.as_rates(rates),
            running=before and before.metrics.finite)
    run.log.clock.dispatched(waited)
    return state, sums, metrics


def _time_alone(run: Run, phase: Phase, ready: Ready, flight: InFlight) -> None:
    """Waits for the first update of a phase, so that it is timed alone."""
    with run.log.clock.spent_on("update"):
        jax.block_until_ready(flight.metrics.finite)
    run.log.timing(
        "phase", flight.start, phase=phase.name, compile_seconds=ready.compile_seconds,
        waited_seconds=ready.waited_seconds, programs=ready.obtained,
        **run.log.clock.first_update())


class _Due(NamedTuple):
    """What is to be done after an update."""

    log: bool  # a line of metrics.jsonl
    noise: bool  # a measurement of the noise scale
    decision: bool  # whether the batch grows
    evaluation: bool
    save: bool

    @property
    def of_the_state(self) -> bool:
        """Whether something needs the state to be known to be finite, and not only its metrics."""
        return self.noise or self.decision or self.evaluation or self.save


def _due(run: Run, course: Course, phase: Phase, start: int, end: int) -> _Due:
    """What is due after the update of `phase` from example `start` to `end`."""
    ends = end == phase.end_example
    over = ends and phase == course.phases[-1]
    noise_due, evaluation = (course.is_due(what, start, end) for what in ("noise", "eval"))
    decision = run.steering is not None and not over and run.steering.is_due(start, end)
    return _Due(
        log=ends or noise_due or decision or evaluation or course.is_due("log", start, end),
        noise=noise_due, decision=decision, evaluation=evaluation,
        save=ends or course.is_due("checkpoint", start, end))


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


def _enter(run: Run, course: Course, phase: Phase, at: Position) -> Ready:
    """Shows that a phase begins or continues, and returns its programs once they are compiled."""
    run.log.line(progress.describe(phase, course.phases))
    layout = course.layouts[phase.index]
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
    run: Run, state: update.State, sums: update.Sums, event: dict[str, Any], at: Position
) -> tuple[update.Sums, dict[str, Any], Position]:
    """Measures the noise scale after the update of `event`, to which it is added.

    No update is counted, and a stop waits: this takes no longer than an update or two.
    """
    with run.log.clock.spent_on("compile"):
        calls = run.programs.measure()
    with run.log.clock.spent_on("evaluation"):
        sums, measured = run.measure(calls, state, sums, event["examples_seen"])
    if run.steering:
        at = at._replace(growth=at.growth.after_measurement(
            measured.by_groups, run.steering.measured_every, run.steering.window))
    return sums, event | noise.line_of_ghosts(measured), at


def _decide(
    run: Run, event: dict[str, Any], at: Position
) -> tuple[dict[str, Any], Position]:
    """Decides whether the batch grows after the update of `event`, to which that is added."""
    growth, asked_for = run.steering.look(at.growth, at.noise, at.examples_seen)
    event = event | {"batch_asked_for": asked_for}
    if growth.decisions != at.growth.decisions:
        _, batch = growth.decisions[-1]
        event |= {"grows_to": batch}
        run.log.line(f"the batch grows to {batch}: the rule asks for {asked_for:.4g}")
    return event, at._replace(growth=growth)


def _evaluate(run: Run, state: update.State) -> dict[str, float]:
    with run.log.clock.spent_on("evaluation"):
        return run.evaluate(state)
