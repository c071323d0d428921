"""The loop of a run on stand-ins: random schedules of lines, evaluations, saves, stops, divergence.

Nothing is computed: a state is the number of updates in it. What is held is the order of effects,
and where the run decides when its batch grows, that it decides what the definition says.
"""

import functools
import itertools
import json
import math
import random
from types import SimpleNamespace
from typing import NamedTuple

import pytest

from bigbatch import loop, schedule, train
from bigbatch.config.course import Course
from bigbatch.job import preemption
from bigbatch.mistake import Mistake
from bigbatch.programs.programs import Ready
from bigbatch.schedule import deciding
from bigbatch.schedule.deciding import Rule, Steering
from bigbatch.schedule.due import interval, make_due
from bigbatch.schedule.rates import Rates
from bigbatch.storage.continuing import Position, position_of
from bigbatch.update import noise
from bigbatch.watching.clock import Clock
from bigbatch.watching.log import Log

N = 40  # examples of an epoch
TOKENS = 3  # of an example
CASES = 1200
LIMITS = schedule.Limits(30, ghost_size=1)
WINDOW = 25  # examples over which the noise scale is averaged


class Case(NamedTuple):
    """A schedule, and where it is told to stop or breaks down."""

    seed: str
    recipe: schedule.Recipe
    strategy: str
    steering: Steering | None
    every: dict[str, float]  # intervals in epochs
    stops: list[int]  # of each start: at which poll it is told to stop
    diverges: int | None  # the update

    def course(self, decisions=()):
        strategy = schedule.Strategy(self.strategy, decisions=decisions)
        phases = schedule.plan_phases(self.recipe, strategy, LIMITS)
        return Course(
            phases, len(phases) - 1, (None,) * len(phases),
            lambda phase, *_: Rates(phase.learning_rate, phase.momentum, 0, 0, 0, 0),
            make_due(self.every, N, phases[-1].end_example))

    def parts(self, number):
        """What update `number` measures of the noise: a quotient that rises, under noise."""
        return draw_parts(self.seed, number)


@functools.lru_cache(maxsize=1000)
def draw_parts(seed, number):
    draw = random.Random(f"{seed} {number}")
    return noise.Parts(draw.gauss(1, 0.7), 8 * draw.random() + number / 4)


def draw_case(seed):
    draw = random.Random(seed)
    epochs = draw.uniform(1, 4)
    falls = sorted({round(draw.uniform(0.1, epochs * 0.95), 2) for _ in range(draw.randrange(3))})
    recipe = schedule.Recipe(
        0.1, draw.choice((2, 4, 5)), 0.9, N, epochs,
        falls=tuple((epoch, draw.choice((2.0, 3.0))) for epoch in falls))
    strategy, steering = draw.choice(("decay", "increase", "measured")), None
    try:
        phases = schedule.plan_phases(recipe, strategy, LIMITS)
    except Mistake:  # of two falls within one update
        return draw_case(f"{seed}, once more")
    every = {what: draw.choice((0.05, 0.2, 0.35, 0.5, 1.0, 3.0))
             for what in ("log", "eval", "checkpoint", *["noise"] * draw.randrange(2))}
    if strategy == "measured":
        rule = Rule(every=draw.choice((1, 7, 30)), stay=draw.choice((0, 10, 50)))
        between = interval(every["noise"], N) if "noise" in every else 1
        steering = Steering(rule, deciding.ladder(recipe, LIMITS), recipe,
                            "noise" in every and draw.random() < 0.5, WINDOW, between)
    updates = sum(phase.updates for phase in phases)
    return Case(
        str(seed), recipe, strategy, steering, every,
        [draw.randrange(3 * updates) for _ in range(draw.randrange(6))],
        draw.randrange(1, updates + 1) if draw.random() < 0.3 else None)


class Measured:
    """What an update measured; to ask whether it is finite is to wait for it."""

    def __init__(self, number, case, effects):
        self.number, self.loss, self.weight = number, float(number), 1.0
        self.means = {"loss": self.loss}
        self.noise = noise.Measured(case.parts(number), None, None)
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
        saved = at._asdict() | {"growth": at.growth._asdict()}
        assert position_of(json.loads(json.dumps(saved))) == at  # as it is read from run.json
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
        display = SimpleNamespace(
            line=lambda text: None, advance=lambda *_: None, position=lambda examples_seen: "")
        log = Log(self.write, display, Clock(None, at.updates), N)
        nothing = SimpleNamespace(before=lambda *_: None, after=lambda *_: None)
        fed = SimpleNamespace(resident=None, update=lambda *_: iter(()))
        return loop.loop(
            loop.Run(
                self.case.course(at.growth.decisions), self.case.steering,
                lambda at: self.case.course(at.growth.decisions), self, self.take_update,
                self.evaluate, lambda means: {"train_loss": means["loss"]}, self.measure_noise,
                WINDOW, fed, lambda rates: rates, N, TOKENS, log, self, self, nothing),
            at, state)


def of_updates(case, batches):
    """The noise scale (None: none) after updates of these batches, and the weight of all."""
    ends = list(itertools.accumulate(batches))
    weights = [(1 - math.exp(-batch / WINDOW)) * math.exp((end - ends[-1]) / WINDOW)
               for batch, end in zip(batches, ends, strict=True)]
    parts = [case.parts(number + 1) for number in range(len(batches))]
    square, trace = (sum(weight * part[of] for weight, part in zip(weights, parts, strict=True))
                     for of in (0, 1))
    return trace / square if square > 0 else None, sum(weights)


def asked_for(case, batches, measurements):
    """The batch of the rule "noise": of all updates so far, or of what was measured at places."""
    if not case.steering.by_all:
        scale, weight = of_updates(case, batches)
        return scale if weight >= 0.5 else None
    keep = math.exp(-case.steering.measured_every / WINDOW)
    weights = [(1 - keep) * keep**ago for ago in reversed(range(len(measurements)))]
    scales = [weight * at / 2 for weight, at in zip(weights, measurements, strict=True)]
    return sum(scales) / sum(weights) if sum(weights) >= 0.5 else None


def expected_lines(case):
    """Of every line of metrics.jsonl, from the definition alone, (updates, examples, whether the
    noise was measured, whether it was evaluated, the noise scale of the updates so far, the batch
    asked for, the batch grown to)."""
    lines, decisions, batches, measurements, start = [], (), [], [], 0
    course = case.course()
    while phase := course.phase_at(start):
        end = start + phase.batch_size
        batches.append(phase.batch_size)
        over = end == course.phases[-1].end_example
        measured, evaluated = (course.is_due(what, start, end) for what in ("noise", "eval"))
        if measured:
            measurements.append(end)
        decides = case.steering and not over and (
            end // case.steering.rule.every > start // case.steering.rule.every)
        asked, grown = decides and asked_for(case, batches, measurements), None
        if asked:
            since = decisions[-1][0] if decisions else 0
            above = [rung for rung in case.steering.rungs if rung > phase.batch_size]
            if above and asked >= above[0] and end - since >= case.steering.rule.stay:
                grown = above[0]
                decisions = (*decisions, (end, grown))
        if (measured or evaluated or decides or end == phase.end_example
                or course.is_due("log", start, end)):
            scale, _ = of_updates(case, batches)
            lines.append((len(batches), end, measured, evaluated, scale and pytest.approx(scale),
                          pytest.approx(asked) if asked else None, grown))
        start = end
        if grown:
            course = case.course(decisions)
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
    stopped = inside = diverged = grown = 0
    for seed in range(part * CASES // 3, (part + 1) * CASES // 3):
        case = draw_case(seed)
        lines = expected_lines(case)
        if case.diverges and case.diverges > lines[-1][0]:  # one that grew is over before
            case = case._replace(diverges=None)
        if case.diverges:
            lines = [line for line in lines if line[0] < case.diverges]
        alone, broke = run_to_the_end(case, [])
        assert all(event["tokens_seen"] == TOKENS * event["examples_seen"]
                   for event in alone["metrics"])
        found = [(event["updates"], event["examples_seen"], "noise_full" in event,
                  "test_accuracy" in event, event["noise_measured"], event.get("batch_asked_for"),
                  event.get("grows_to")) for event in alone["metrics"]]
        assert found == lines, f"seed {seed}"
        assert broke == (case.diverges is not None)
        grown += any("grows_to" in event for event in alone["metrics"])
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
    assert stopped > 120 and inside > 20 and diverged > 50, (stopped, inside, diverged)
    assert grown > 50, grown
