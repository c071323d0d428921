"""What a person watching is told."""

import contextlib
import os
import sys

import pytest

from bigbatch.config import make_phases
from bigbatch.watching import progress
from tests.support import configs


def test_the_time_to_go_knows_the_phases():
    """Batches of 48, 96 and 192 in 21, 11 and 5 updates; an update's time is known by its batch."""
    phases = make_phases(configs.tiny())
    assert [(phase.batch_size, phase.updates) for phase in phases] == [(48, 21), (96, 11), (192, 5)]
    assert progress.seconds_to_go(phases, 0, {}) is None
    known = {48: 1.0, 96: 1.5, 192: 2.0}
    assert progress.seconds_to_go(phases, 0, known) == pytest.approx(21 + 11 * 1.5 + 5 * 2)
    assert progress.seconds_to_go(phases, 20 * 48, known) == pytest.approx(1 + 11 * 1.5 + 5 * 2)
    # A batch not yet met costs what the largest known one does an example.
    assert progress.seconds_to_go(phases, 0, {48: 1.0}) == pytest.approx(21 + 11 * 2 + 5 * 4)
    assert progress.seconds_to_go(phases, phases[-1].end_example, known) == 0
    assert [progress.format_seconds(s) for s in (None, 59.6, 3723)] == ["--:--", "01:00", "1:02:03"]


def test_a_position_is_in_epochs_and_in_tokens_where_there_are_some():
    assert progress.position(150, 100, None) == "epoch 1.50"
    assert progress.position(150, 100, 8) == "epoch 1.50, 1200 tokens"
    assert progress.position(2_441_406, 9_765_625, 1024) == "epoch 0.25, 2.5e9 tokens"


def test_a_terminal_that_breaks_ends_no_run(monkeypatch):
    """With the bar, too, which a thread of its own draws."""
    phases = make_phases(configs.tiny())
    reader, writer = os.pipe()
    os.close(reader)
    with contextlib.suppress(BrokenPipeError), open(writer, "w") as broken:
        monkeypatch.setattr(sys, "stderr", broken)
        monkeypatch.setattr(broken, "isatty", lambda: True, raising=False)
        display = progress.Display(phases, 1000)
        for seen in (48, 96):
            display.line("a line")
            display.advance(seen, {48: 1.0})
        display.close()
    monkeypatch.setattr(sys, "stderr", None)  # as Python has it where it was closed
    progress.Display(phases, 1000).line("a line")


def test_a_phase_is_announced_in_one_line():
    phases = make_phases(configs.tiny("recipe.warmup_epochs=0.3"))
    lines = [progress.describe(phase, phases) for phase in phases]
    assert lines[0].startswith("phase 0 of 0 to 3, warmup: batch 48, rate 0 to 0.1, momentum 0.9")
    assert lines[2].startswith("phase 2 of 0 to 3, noise/2: batch 96, rate 0.1, ")
