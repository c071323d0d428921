"""The whole story of a run: what will be done, where it stands, its programs, the loop."""

import contextlib
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.profiler import StepTraceAnnotation
from jax.sharding import Mesh
from ml_collections import ConfigDict

from bigbatch import (
    bucket,
    checkpoint,
    chip_peaks,
    compilation,
    continuing,
    evaluate,
    job,
    metrics,
    network,
    preemption,
    profiling,
    programs,
    progress,
    schedule,
    seats,
    update,
    workdir,
)
from bigbatch.config import check, make_due, make_phases, make_seatings
from bigbatch.data import feed
from bigbatch.devices import cut, make_mesh, place, replicated, shape_of
from bigbatch.dispatch import NotFinite, check_finite, take_update

# More, and the host would hold one more copy of the state; with fewer a checkpoint at a phase's end
# would wait for one just before it.
SAVES_AT_ONCE = 2


class Preempted(Exception):
    """The run was told to stop (SIGTERM, Ctrl-C) and did, with a checkpoint."""


class StoppedAfterPhase(Exception):
    """The run stopped where it was asked to, with a checkpoint, before its end."""


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
        ValueError: for anything in the config or the workdir that cannot be right; nothing has
            been compiled or written to the run's logs then.
        StoppedAfterPhase, Preempted: the run stopped before its end, with a checkpoint.
        NotFinite: naming the update at which training broke down.
        WriteError: if a checkpoint or a log could not be written.
    """
    # What will be done. Refused here: whatever can be told from the config alone.
    check(config)
    phases = make_phases(config)
    examples, total = config.data.train_examples, phases[-1].end_example
    last_phase = phases[-1]
    if stop_after_phase:
        last_phase = schedule.find_phase(phases, stop_after_phase, "--stop_after_phase")
    if config.dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    span = profiling.parse(profile, phases[-1].start_update + phases[-1].updates)
    mesh = make_mesh()
    seatings = make_seatings(config, phases, mesh.size)
    net = network.build(config)

    with contextlib.ExitStack() as at_end:
        # Where the run stands. The first process looks, so that all agree.
        folder, mirror = at_end.enter_context(bucket.opened(workdir_path))
        writing = jax.process_index() == 0

        def open_run() -> list[Any]:
            at_end.enter_context(mirror.held() if mirror else workdir.open_workdir(folder))
            path, run, faults = checkpoint.find_newest(folder, mirror)
            return [path and str(path.relative_to(folder)), run, faults]

        found = checkpoint.Found(*job.decided_by_first("run", open_run))
        watch = preemption.Watch()
        at_end.callback(watch.close)
        allowed_changes: list[str] = []
        if found.path:
            refused, allowed_changes = continuing.changes(found.run, config, phases)
            if refused:
                raise ValueError(
                    f"{workdir_path} holds a run of another config, which this cannot continue: "
                    f"{'; '.join(refused)}. Give this one another --workdir, or set the keys back."
                )
        examples_seen, updates, owed = continuing.position_of(found.run)
        now = schedule.phase_at(phases, examples_seen)
        to_run = phases[now.index : last_phase.index + 1] if now else ()
        seatings_to_run = [seatings[phase.index] for phase in to_run]

        # The data and the state, on the devices. That of a new run is drawn once its programs are
        # lowered: until then its shapes are enough.
        is_due = make_due(config, total)
        evaluated_at = [examples_seen] if owed else []  # a stop between is inside an evaluation
        evaluated_at += [end for start, end in schedule.spans(to_run, examples_seen)
                         if is_due("eval", start, end)]
        fed = feed.open_feed(config, mesh, to_run, seatings_to_run, examples_seen, evaluated_at)
        at_end.callback(fed.close)
        state = update.abstract_state(config, net, mesh)
        if found.path:
            state = checkpoint.restore(folder / found.path, state, mirror)
            state = place(state, replicated(mesh))

        # The logs, cut back to where the run stands.
        describe_run = partial(continuing.describe_run, config, phases)
        write_board = None
        saves: deque[Future] = deque()
        names_what_fails = partial(checkpoint.names_what_fails, folder, mirror)
        if writing:
            if mirror:
                at_end.enter_context(checkpoint.sending_last_logs(folder, mirror, saves))
            with names_what_fails():
                workdir.write_config(folder, describe_run(examples_seen, updates, owed))
                metrics.cut_events(folder / "metrics.jsonl", examples_seen, owed is not None)
                metrics.cut_half_line(folder / "timing.jsonl")
            if config.tensorboard:
                from bigbatch import tensorboard  # see there why not above

                board = tensorboard.open_board(folder, examples_seen)
                at_end.callback(tensorboard.close_board, board)
                write_board = partial(tensorboard.write_board, board)
        log = partial(_log, folder, writing, write_board, names_what_fails)
        display = progress.Display(phases, examples, show and writing)
        at_end.callback(display.close)
        kind = mesh.devices.flat[0].device_kind
        log("timing", {
            "event": "start", "examples_seen": examples_seen, "devices": mesh.size,
            "device_kind": kind, "jax": jax.__version__, "time": time.time(),
        })

        def tell(text: str) -> None:
            display.line(text)
            log("timing", {"event": "notice", "examples_seen": examples_seen, "text": text})

        for text in [*found.faults, *(f"changed: {change}" for change in allowed_changes)]:
            tell(text)
        if found.path:
            display.line(f"continuing at epoch {examples_seen / examples:.2f}, update {updates}")
        display.line(f"{mesh.size} x {kind}")
        tracer = profiling.Tracer(span, updates, folder, workdir_path, tell)
        at_end.callback(tracer.close)

        # What the loop does between updates.
        shares = metrics.TimeShares()
        seconds_per_update: dict[int, float] = {}
        boundaries = {phase.end_example for phase in phases}
        saved_at = examples_seen
        last_speed = updates
        peak = chip_peaks.peak_flops(kind, config.dtype)
        flops: float | None = None  # of an update on all devices
        idle_since: float | None = None  # by `shares.training`: the end of the phase before
        number = jax.tree.leaves(state.params)[0].dtype.type

        @lru_cache(maxsize=1)  # the same for most of a phase's updates
        def on_devices(rate: float, momentum: float) -> tuple[jax.Array, jax.Array]:
            return place((number(rate), number(momentum)), replicated(mesh))

        previous: tuple[int, int, update.Metrics] | None = None  # not yet known to be finite
        unwritten: Callable[[], dict[str, Any]] | None = None  # of `previous`: its event

        def save() -> None:
            nonlocal saved_at
            began = time.perf_counter()
            finish_saves(SAVES_AT_ONCE - 1)
            saves.append(checkpoint.save(
                folder, state, describe_run(examples_seen, updates, owed),
                config.keep_checkpoints, boundaries, mirror,
            ))
            saved_at = examples_seen
            log("timing", {"event": "save", "examples_seen": examples_seen,
                           "blocked_seconds": round(time.perf_counter() - began, 4)})

        def finish_saves(leave: int) -> None:
            """Raises what went wrong in the background; waits while over `leave` are under way."""
            while saves and (saves[0].done() or len(saves) > leave):
                saves.popleft().result()

        def check_previous() -> None:
            """Waits for `previous`, and notes where training broke down if it did."""
            try:
                check_finite(previous)
            except NotFinite:
                broken, start, _ = previous
                log("timing", {"event": "diverged", "updates": broken - 1, "examples_seen": start,
                               "epoch": start / examples})
                raise

        def settle(event: dict[str, Any]) -> None:
            """Evaluates, if that is due, and writes the event of a finished update."""
            nonlocal last_speed
            if event.pop("evaluate"):
                with shares.spent_on("evaluation"):
                    program = futures[("evaluate",)].result().call
                    event |= evaluate.whole_test_set(
                        program, state.params, state.batch_stats, fed, watch.before_reduction)
                display.line(
                    f"epoch {event['epoch']:.2f}, update {event['updates']}: train loss "
                    f"{event['train_loss']:.4f}, test accuracy {event['test_accuracy']:.4f}"
                )
            log("metrics", event)
            speed = shares.speed(event["updates"] - last_speed, event["batch_size"], flops,
                                 peak and peak * mesh.size)
            last_speed = event["updates"]
            log("timing", {"event": "speed", "examples_seen": event["examples_seen"], **speed}
                | ({"images_skipped": fed.skipped} if config.data.streaming else {}))
            if speed["updates"]:
                seconds_per_update[event["batch_size"]] = 1 / speed["updates_per_second"]
            display.advance(event["examples_seen"], seconds_per_update)

        def tell_shares() -> None:
            whole = shares.whole()
            log("timing", {"event": "time_share", "examples_seen": examples_seen, **whole})
            display.line(progress.describe_shares(whole["time_share"], whole["wall_seconds"]))

        # The programs, the state and the loop. Everything due is a function of the examples seen.
        try:
            display.line("compiling")
            with shares.spent_on("compile"):
                lower = programs.lowering(
                    config, net, mesh, *jax.tree.map(shape_of, (state, fed.resident, fed.test)))
                first, later = compilation.compile_order(seatings_to_run, not found.path)
                futures = compilation.compile_ahead(
                    lower, first + later, peak is not None, watch.poll)
                if not found.path:
                    init = futures[("init",)]
                    watch.wait(init.done)
                    state = jax.tree.map(np.asarray, init.result().call(np.uint32(config.seed)))
                    state = place(state, replicated(mesh))
                sums = _room_for_sums(state, seatings_to_run, mesh)
                watch.wait(lambda: all(futures[key].done() for key in first))
                for key in first:
                    futures[key].result()
            if owed:
                settle(dict(owed))
                owed = None
            for phase in to_run:
                display.line(progress.describe(phase, phases))
                seating = seatings[phase.index]
                began = time.perf_counter()
                with shares.spent_on("compile"):
                    keys = compilation.keys_of(seating)
                    if not all(futures[key].done() for key in keys):
                        tell(f"waiting for the compiler: phase {phase.name} is not ready")
                    watch.wait(lambda keys=keys: all(futures[key].done() for key in keys))
                    compiled = [futures[key].result() for key in keys]
                flops = compilation.update_flops(compiled, seating)
                entering: dict[str, Any] | None = {
                    "event": "phase", "examples_seen": examples_seen, "phase": phase.name,
                    "compile_seconds": [round(program.seconds, 3) for program in compiled],
                    "waited_seconds": round(time.perf_counter() - began, 3),
                }
                while examples_seen < phase.end_example:
                    # One update.
                    rate = schedule.learning_rate_at(phase, examples_seen)
                    tracer.before(updates + 1, state)
                    step = StepTraceAnnotation("update", step_num=updates + 1)
                    with step, shares.spent_on("update"):
                        state, sums, measured, waited = take_update(
                            [program.call for program in compiled], state, sums, fed.resident,
                            fed.update(phase, seating, examples_seen),
                            on_devices(rate, phase.momentum), watch,
                            previous and previous[2].loss,
                        )
                    shares.move("update", "input", waited)
                    dispatched = shares.training()

                    # The one before is finished and written down while this one runs.
                    with shares.spent_on("update"):
                        check_previous()
                    if unwritten:
                        settle(unwritten())
                        unwritten = None
                    start, examples_seen = examples_seen, examples_seen + phase.batch_size
                    updates += 1
                    previous = updates, start, measured
                    tracer.after(updates, state)
                    if entering:  # the one wait in a phase: for its first update, to know its time
                        with shares.spent_on("update"):
                            check_previous()
                        log("timing", entering | {
                            "extra_seconds": idle_since and round(dispatched - idle_since, 4),
                            "first_update_seconds": round(shares.training() - dispatched, 4),
                        })
                        entering = None

                    # What is due after it.
                    ends = examples_seen == phase.end_example
                    evaluating = is_due("eval", start, examples_seen)
                    saving = ends or is_due("checkpoint", start, examples_seen)
                    if ends or evaluating or is_due("log", start, examples_seen):
                        unwritten = partial(_event, {
                            "updates": updates, "examples_seen": examples_seen,
                            "epoch": examples_seen / examples, "phase": phase.name,
                            "batch_size": phase.batch_size, "learning_rate": rate,
                            "momentum": phase.momentum,
                            "noise_scale": schedule.noise_scale(
                                rate, phase.momentum, examples, phase.batch_size),
                            "evaluate": evaluating,
                        }, measured)
                    if evaluating or saving:
                        with shares.spent_on("update"):
                            check_previous()
                        idle_since = shares.training()
                        if unwritten:
                            owed, unwritten = unwritten(), None
                            settle(dict(owed))
                            owed = None
                    with shares.spent_on("checkpoint"):
                        finish_saves(SAVES_AT_ONCE)
                        if saving:
                            save()
        except (NotFinite, ValueError):  # the latter from an image that cannot be decoded
            finish_saves(0)
            raise
        except preemption.Stop:
            finish_saves(0)
            check_previous()
            if unwritten:
                settle(unwritten())
            if examples_seen != saved_at:
                save()
            finish_saves(0)
            tell_shares()
            display.line(f"told to stop: saved at example {examples_seen}, update {updates}")
            raise Preempted(f"told to stop at example {examples_seen}") from None

        with shares.spent_on("checkpoint"):
            finish_saves(0)
        tell_shares()
        if examples_seen < total:
            display.line(f"stopped after phase {last_phase.name} at example {examples_seen}")
            raise StoppedAfterPhase(f"stopped after phase {last_phase.name}")
        display.line(f"finished: {updates} updates, {examples_seen} examples")
        return state


def _room_for_sums(
    state: update.State, seatings: Sequence[seats.Seating], mesh: Mesh
) -> update.Sums | None:
    """What microbatches add up in, on each device; None where an update has but one."""
    if all(seating.microbatches == 1 for seating in seatings):
        return None
    shapes = update.abstract_sums(state, mesh)
    return jax.jit(
        lambda: jax.tree.map(lambda leaf: jax.numpy.zeros(leaf.shape, leaf.dtype), shapes),
        out_shardings=cut(mesh),
    )()


def _event(event: Mapping[str, Any], measured: update.Metrics) -> dict[str, Any]:
    """The event of an update with what was measured in it, for which it waits."""
    return {**event, "train_loss": float(measured.loss), "train_accuracy": float(measured.accuracy)}


def _log(
    folder: Path, writing: bool, write_board: Callable | None, names_what_fails: Callable,
    kind: str, event: Mapping[str, Any],
) -> None:
    """Adds a line to metrics.jsonl or timing.jsonl, and to TensorBoard, on the first process."""
    if not writing:
        return
    with names_what_fails(f"{kind}.jsonl"):
        metrics.append_event(folder / f"{kind}.jsonl", event)
    if write_board and kind == "metrics":
        with names_what_fails("tensorboard"):
            write_board(event)
