"""Speeds and shares of time on a made-up device: the loop, its clock and what it dispatches."""

import time
from functools import partial
from types import SimpleNamespace

import pytest

from bigbatch import loop, schedule
from bigbatch.config.course import Course
from bigbatch.programs import dispatch
from bigbatch.programs.programs import Ready
from bigbatch.schedule import Rates
from bigbatch.schedule.due import make_due
from bigbatch.storage.continuing import Position
from bigbatch.watching.clock import Clock
from bigbatch.watching.log import Log

N = 40  # examples of an epoch
PASS, LAST = 1.0, 0.25  # seconds of a pass, and of the program after the passes
EVALUATION, CALL = 2.0, 0.001


class Device:
    """Runs programs one after another; its clock is the only one there is."""

    def __init__(self):
        self.now = self.free = 0.0

    def dispatch(self, seconds):
        self.now += CALL
        self.free = max(self.free, self.now) + seconds
        return Output(self, self.free)


class Output:
    def __init__(self, device, end):
        self.device, self.end = device, end

    def is_ready(self):
        return self.device.now >= self.end

    def block_until_ready(self):
        self.device.now = max(self.device.now, self.end)

    def __float__(self):
        self.block_until_ready()
        return 1.0

    __bool__ = is_finite = lambda self: float(self) == 1.0


def run(monkeypatch, passes, input_seconds=0.0, every=None):
    """The events of timing.jsonl of a run of two phases, with batches of 4 and 8."""
    device, events = Device(), []
    monkeypatch.setattr(time, "perf_counter", lambda: device.now)
    recipe = schedule.Recipe(0.1, 4, 0.9, N, 2, falls=((1, 2.0),))
    phases = schedule.plan_phases(recipe, "increase", schedule.Limits(ghost_size=1))

    def measured():
        output = device.dispatch(LAST if passes > 1 else PASS)
        unmeasured = SimpleNamespace(by_norms=None, by_groups=None, groups=None)
        return SimpleNamespace(finite=output, means={"loss": output}, noise=unmeasured)

    def accumulate(state, sums, *_):
        return sums, device.dispatch(PASS)

    def batches(*_):
        for number in range(passes):
            device.now += input_seconds
            yield number

    def evaluate(_):
        device.now += EVALUATION
        return {"test_loss": 0.0, "test_accuracy": 0.0}

    calls = [accumulate] if passes > 1 else []
    calls.append(lambda *_: (None, measured()))
    clock = Clock(None, 0)
    display = SimpleNamespace(
        line=lambda text: None, advance=lambda *_: None, position=lambda examples_seen: "")
    nothing = SimpleNamespace(
        before=lambda *_: None, after=lambda *_: None, wait=lambda: None, newest=0,
        raise_failures=lambda: None, start=lambda *_: 0.0, begin=lambda *_: (None, None),
        wait_for=lambda *_: Ready(calls, [0.0], 0.0, None, {}))
    every = every or {"log": 0.01, "eval": 1.0, "checkpoint": 1.0}
    course = Course(
        phases, len(phases) - 1, (None,) * len(phases),
        lambda phase, *_: Rates(phase.learning_rate, phase.momentum, 0, 0, 0, 0),
        make_due(every, N, phases[-1].end_example))
    loop.loop(
        loop.Run(
            course, None, None, nothing,
            partial(dispatch.take_update, started=clock.update_started,
                    landed=clock.update_landed),
            evaluate, lambda means: {"train_loss": float(means["loss"])}, None, N,
            SimpleNamespace(resident=None, update=batches), lambda rates: rates, N, None,
            Log(lambda _, event: events.append(event), display, clock, N), nothing, nothing,
            nothing),
        Position(), None)
    return device, events


@pytest.mark.parametrize("passes", [1, 4])
def test_every_line_has_the_speed_of_its_own_updates(monkeypatch, passes):
    device, events = run(monkeypatch, passes)
    seconds = passes * PASS + LAST if passes > 1 else PASS
    speeds = [event for event in events if event.get("event") == "speed"]
    assert [event["updates"] for event in speeds] == [1] * 15
    for event, batch in zip(speeds, [4] * 10 + [8] * 5, strict=True):
        assert event["updates_per_second"] == pytest.approx(1 / seconds, rel=0.01)
        assert event["examples_per_second"] == pytest.approx(batch / seconds, abs=0.06)
    # The evaluation of each phase is in the line after it.
    assert [event["time_share"]["evaluation"] > 0 for event in speeds] == (
        [False] * 9 + [True] + [False] * 4 + [True])
    assert sum(event["seconds"] for event in speeds) == pytest.approx(device.now, abs=1e-3)
    first = [event["first_update_seconds"] for event in events if event.get("event") == "phase"]
    assert first == pytest.approx([seconds] * 2, rel=0.01)


def test_lines_of_several_updates_and_none_of_some(monkeypatch):
    _, events = run(monkeypatch, 4, every={"log": 0.3, "eval": 2.0, "checkpoint": 2.0})
    speeds = [event for event in events if event.get("event") == "speed"]
    assert [event["updates"] for event in speeds] == [3, 3, 3, 1, 1, 2, 1, 1]
    for event in speeds:
        assert event["updates_per_second"] == pytest.approx(1 / (4 * PASS + LAST), rel=0.01)


@pytest.mark.parametrize("passes", [1, 4])
def test_input_that_the_device_waits_for_is_shared_out(monkeypatch, passes):
    """Three seconds for an input, of which the device works one."""
    device, events = run(monkeypatch, passes, input_seconds=3.0)
    speeds = [event for event in events if event.get("event") == "speed"]
    for event in speeds:
        share = event["time_share"]
        assert all(part >= -1e-9 for part in share.values()), event
        assert sum(share.values()) == pytest.approx(1, abs=1e-3)
    waited = sum(event["time_share"]["input"] * event["seconds"] for event in speeds)
    assert waited == pytest.approx(15 * passes * 3.0, rel=0.01)
    assert sum(event["seconds"] for event in speeds) == pytest.approx(device.now, abs=1e-3)
