"""The loop of a run on stand-ins: random schedules of lines, evaluations, saves, stops, divergence.

Nothing is computed: a state is the number of updates in it. What is held is the order of effects.
"""

import random
from types import SimpleNamespace
from typing import NamedTuple

import pytest

from bigbatch import schedule, train
from bigbatch.job import preemption
from bigbatch.mistake import Mistake
from bigbatch.programs.programs import Ready
from bigbatch.schedule.due import make_due
from bigbatch.schedule.rates import Rates
from bigbatch.schedule.smoothing import Smoothed
from bigbatch.storage.continuing import Position
from bigbatch.update import noise
from bigbatch.watching.clock import Clock
from bigbatch.watching.log import Log

N = 40  # examples of an epoch
TOKENS = 3  # of an example
WINDOW = 16  # examples over which the noise scale is averaged
CASES = 1500


class Case(NamedTuple):
    """A schedule, and where it is told to stop or breaks down."""

    phases: tuple[schedule.Phase, ...]
    every: dict[str, float]  # intervals in epochs
    stops: list[int]  # of each start: at which poll it is told to stop
    diverges: int | None  # the update

    @property
    def is_due(self):
        return make_due(self.every, N, self.phases[-1].end_example)


def draw_case(seed):
    draw = random.Random(seed)
    epochs = draw.uniform(1, 4)
    falls = sorted({round(draw.uniform(0.1, epochs * 0.95), 2) for _ in range(draw.randrange(3))})
    recipe = schedule.Recipe(
        0.1, draw.choice((2, 4, 5)), 0.9, N, epochs,
        falls=tuple((epoch, draw.choice((2.0, 3.0))) for epoch in falls))
    try:
        phases = schedule.plan_phases(
            recipe, draw.choice(("decay", "increase")), schedule.Limits(ghost_size=1))
    except Mistake:  # of two falls within one update
        return draw_case(f"{seed}, once more")
    every = {what: draw.choice((0.05, 0.2, 0.35, 0.5, 1.0, 3.0))
             for what in ("log", "eval", "checkpoint", *["noise"] * draw.randrange(2))}
    updates = sum(phase.updates for phase in phases)
    return Case(
        phases, every, [draw.randrange(3 * updates) for _ in range(draw.randrange(6))],
        draw.randrange(1, updates + 1) if draw.random() < 0.3 else None)


class Measured:
    """What an update measured; to ask whether it is finite is to wait for it."""

    def __init__(self, number, case, effects):
        self.number, self.loss, self.weight = number, float(number), 1.0
        self.means = {"loss": self.loss}
        self.noise = noise.Measured(noise.Parts(float(number), number**2 + 1.0), None, None)
        self._finite, self._effects = number != case.diverges, effects

    @property
    def finite(self):
        self._effects.append(("landed", self.number))
        return self._finite


class World:
    """A start of a run: the stand-ins, what they did in order, and what is on the disk."""

    def __init__(self, case, disk, stop_at):
        self.case, self.disk, self.effects = case, disk, []
        self.polls, self.stop_at = 0, stop_at
        self.newest = disk["checkpoint"][1].examples_seen
        self.pending = []

    def poll(self):
        self.polls += 1
        if self.polls == self.stop_at:
            raise preemption.Stop

    # The programs.
    def begin(self, state, watch):
        self.poll()
        return state, None

    def wait_for(self, layout, watch, say):
        self.poll()
        return Ready(["program"], [0.0], 0.0, None, {})

    def take_update(self, calls, state, sums, resident, batches, rates, running):
        self.poll()
        number = state + 1
        self.effects.append(("take", number))
        return number, sums, Measured(number, self.case, self.effects), 0.0

    def measure(self):
        return []

    def measure_noise(self, calls, state, sums, position):
        self.effects.append(("measure", state))
        return sums, noise.Measured(None, noise.Parts(2.0, float(position)), 4.0)

    def evaluate(self, state):
        self.effects.append(("evaluate", state))
        self.poll()
        self.poll()
        return {"test_loss": 0.0, "test_accuracy": state / 1e3}

    # The checkpoints: begun here, on the disk when they are waited for or by the next one.
    def start(self, state, at):
        self.wait()
        self.effects.append(("save", state))
        self.pending.append((state, at))
        self.newest = at.examples_seen
        return 0.0

    def raise_failures(self):
        pass

    def wait(self):
        for saved in self.pending:
            self.disk["checkpoint"] = saved
        self.pending.clear()

    # The logs.
    def write(self, kind, event):
        if kind == "metrics":
            self.effects.append(("line", event["updates"]))
            self.disk["metrics"].append(dict(event))
        else:
            self.effects.append((event["event"], event.get("updates")))

    def run(self):
        state, at = self.disk["checkpoint"]
        # As a start cuts the log back to where the run stands.
        last = at.examples_seen - (at.pending_evaluation is not None)
        self.disk["metrics"] = [
            event for event in self.disk["metrics"] if event["examples_seen"] <= last]
        phases = self.case.phases
        now = schedule.phase_at(phases, at.examples_seen)
        to_run = phases[now.index:] if now else ()
        display = SimpleNamespace(line=lambda text: None, advance=lambda *_: None)
        log = Log(self.write, display, Clock(None, at.updates), N)
        nothing = SimpleNamespace(before=lambda *_: None, after=lambda *_: None)
        fed = SimpleNamespace(resident=None, update=lambda *_: iter(()))
        return train.loop(
            train.Run(
                phases, to_run, (None,) * len(to_run), self, self.take_update, self.evaluate,
                lambda means: {"train_loss": means["loss"]}, self.measure_noise, WINDOW, fed,
                lambda phase, *_: Rates(phase.learning_rate, phase.momentum, 0, 0, 0),
                lambda rates: rates, self.case.is_due, N, TOKENS, log, self, self, nothing),
            at, state)


def expected_lines(case):
    """Of every line of metrics.jsonl, from the definition alone, (updates, examples, whether the
    noise was measured, whether it was evaluated, the noise scale of the updates so far)."""
    lines, updates, smoothed = [], 0, Smoothed()
    for phase in case.phases:
        for start in range(phase.start_example, phase.end_example, phase.batch_size):
            end, updates = start + phase.batch_size, updates + 1
            smoothed = smoothed.after(
                noise.Parts(updates, updates**2 + 1.0), phase.batch_size, WINDOW)
            measured, evaluated = (case.is_due(what, start, end) for what in ("noise", "eval"))
            if (measured or evaluated or end == phase.end_example
                    or case.is_due("log", start, end)):
                lines.append((updates, end, measured, evaluated, smoothed.scale))
    return lines


def check_order(effects, case):
    """What must hold between the effects of one start."""
    landed, taken, ended = set(), [], set()
    for kind, number in effects:
        if kind == "take":
            assert not taken or number == taken[-1] + 1
            if len(taken) > 1:
                assert taken[-2] in landed, "two updates were in flight when a third was dispatched"
            taken.append(number)
        elif kind == "landed":
            landed.add(number)
            assert number in taken
        elif kind in ("measure", "evaluate", "save", "line") and number in taken:
            assert number in landed, f"{kind} of update {number} before it had landed"
            assert number != case.diverges, f"{kind} of an update that broke down"
            if kind != "line":
                assert number == taken[-1], f"{kind} of a state that is no more"
                ended.add(number)
            elif number not in ended:
                assert number >= taken[-1] - 1, "a line was written late"


def run_to_the_end(case, stops):
    """All starts of a run, the disk after them, and whether it diverged."""
    disk = {"checkpoint": (0, Position()), "metrics": []}
    for stop_at in [*stops, None]:
        world = World(case, disk, stop_at)
        before = disk["checkpoint"]
        try:
            state, at = world.run()
        except train.Preempted:
            check_order(world.effects, case)
            assert world.effects[-1] == ("time_share", None)
            saved = [effect for effect in world.effects if effect[0] == "save"]
            # Where it stands is on the disk: saved now, or it is what it began with.
            assert world.pending == [] and (saved or disk["checkpoint"] == before)
            last_taken = [number for kind, number in world.effects if kind == "take"][-1:]
            assert last_taken in ([], [disk["checkpoint"][0]])
            continue
        except train.NotFinite as error:
            check_order(world.effects, case)
            assert f"update {case.diverges} " in str(error)
            assert ("All checkpoints are from before it" in str(error)) == (world.newest > 0)
            assert ("There is no checkpoint" in str(error)) == (world.newest == 0)
            assert [effect for effect in world.effects if effect[0] == "diverged"] == [
                ("diverged", case.diverges - 1)]
            assert world.pending == [] and disk["checkpoint"][0] < case.diverges
            return disk, True
        check_order(world.effects, case)
        # A start that had nothing left but an evaluation saves no second checkpoint of the end.
        saved, saved_at = disk["checkpoint"]
        assert (saved, saved_at._replace(pending_evaluation=None)) == (state, at)
        return disk, False


@pytest.mark.parametrize("part", range(3))
def test_every_schedule_leaves_what_its_definition_says(part):
    stopped = inside = diverged = 0
    for seed in range(part * CASES // 3, (part + 1) * CASES // 3):
        case = draw_case(seed)
        lines = expected_lines(case)
        if case.diverges:
            lines = [line for line in lines if line[0] < case.diverges]
        alone, broke = run_to_the_end(case, [])
        assert all(event["tokens_seen"] == TOKENS * event["examples_seen"]
                   for event in alone["metrics"])
        found = [(event["updates"], event["examples_seen"], "noise_full" in event,
                  "test_accuracy" in event, event["noise_measured"]) for event in alone["metrics"]]
        assert found == lines, f"seed {seed}"
        assert broke == (case.diverges is not None)
        for event in alone["metrics"]:
            assert event["train_loss"] == event["updates"]
            if "test_accuracy" in event:
                assert event["test_accuracy"] == event["updates"] / 1e3, "of another state"
            if "noise_full" in event:
                assert event["noise_full"] == event["examples_seen"] / 2, "of another position"
        resumed, _ = run_to_the_end(case, case.stops)
        assert resumed["metrics"] == alone["metrics"], f"seed {seed}: {case}"
        assert resumed["checkpoint"][0] == alone["checkpoint"][0] or broke
        # That the cases are those that matter.
        world = World(case, {"checkpoint": (0, Position()), "metrics": []}, (case.stops or [0])[0])
        try:
            world.run()
        except train.Preempted:
            stopped += 1
            inside += world.disk["checkpoint"][1].pending_evaluation is not None
        except train.NotFinite:
            diverged += 1
    assert stopped > 200 and inside > 20 and diverged > 50, (stopped, inside, diverged)
