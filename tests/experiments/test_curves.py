"""Figures and tables are drawn from workdirs alone."""

import re

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from bigbatch import schedule
from bigbatch.storage.logs import read_events
from experiments import curves, drawing, figures, logs
from experiments.command_line import one_line_errors
from tests.support import made_up_runs
from tests.support.made_up_runs import write_events
from tests.support.tables import rows_of


def write_run(folder, final, updates=4, **config):
    """A finished run as a workdir holds it: two updates an epoch, loss 1/update."""
    accuracies = [0.5] * (updates - 1) + [final]
    losses = [1 / update for update in range(1, 1 + updates)]
    return made_up_runs.write_run(folder, accuracies, losses, 50, 100, **config)


def break_down(folder, updates, loss=1e12):
    """Makes a finished run one that diverged after so many updates, of a last loss that is huge."""
    events = read_events(folder / "metrics.jsonl")[:updates]
    if events:
        events[-1]["train_loss"] = loss
    write_events(folder / "metrics.jsonl", events)
    write_events(folder / "timing.jsonl", [
        *read_events(folder / "timing.jsonl"),
        {"event": "start", "devices": 1, "device_kind": "cpu"},
        {"event": "diverged", "updates": updates, "epoch": updates / 2}])
    return folder


def test_the_table_has_mean_and_deviation_of_the_last_evaluations(tmp_path):
    folders = [write_run(tmp_path / str(seed), 0.9 + 0.02 * seed) for seed in (0, 1, 2)]
    runs = [logs.read_run(folder) for folder in folders]
    row = rows_of(curves.table({"decay": runs}))[-1]
    assert row == ["decay", "3", "92.00 ± 2.00 %", "4", "3.5"]


def test_a_run_that_diverged_is_in_no_mean(tmp_path):
    """Also one that diverged at once, which has no metrics.jsonl."""
    runs = [logs.read_run(write_run(tmp_path / "whole", 0.9))]
    runs += [logs.read_run(break_down(write_run(tmp_path / str(updates), 0.9), updates))
             for updates in (3, 0)]
    says = "2 of 3 diverged at epoch 1.5, 0"
    assert rows_of(curves.table({"a": runs}))[-1] == ["a", "3", f"90.00 %; {says}", "4", "3.5"]
    assert rows_of(curves.table({"a": runs[1:]}))[-1][2].startswith("2 of 2 diverged ")
    axis = Figure().subplots()
    panel = figures.of_schedules(["a"], "").panels[0]
    mean = drawing.plot_runs(axis, panel, runs, "black", "a")
    assert mean.tolist() == [1 / update for update in range(1, 5)]
    assert axis.get_ylim()[1] < 2  # the huge loss does not make the others flat
    # The run that diverged is drawn up to where it did.
    assert [0.5, 1.0, 1.5] in [list(line.get_xdata()) for line in axis.get_lines()]


def test_seeds_that_take_other_numbers_of_updates_are_drawn_each_by_itself(tmp_path):
    """As runs do that decide when their batch grows; against epochs they have a mean."""
    def seed(updates, batch):
        return logs.read_run(made_up_runs.write_run(
            tmp_path / str(updates), [0.5] * (updates - 1) + [0.9], [1.0] * updates, batch, 100))

    runs = [seed(4, 50), seed(8, 25)]
    assert rows_of(curves.table({"a": runs}))[-1][3] == "6 (4 to 8)"
    (epochs, updates) = (panel for panel in figures.of_schedules(["a"], "").panels
                         if panel.quantity == "test_accuracy")
    axis = Figure().subplots()
    drawing.plot_runs(axis, updates, runs, "black", "a")
    assert [list(line.get_xdata()) for line in axis.get_lines()] == [
        list(range(1, 5)), list(range(1, 9))]
    assert [text.get_text() for text in axis.legend().get_texts()] == ["a (6 (4 to 8) updates)"]
    # As many values, at almost the same epochs: a mean of both.
    other = runs[0]._replace(events=[
        event | {"epoch": event["epoch"] + 0.2, "updates": event["updates"] + 1}
        for event in runs[0].events])
    axis = Figure().subplots()
    drawing.plot_runs(axis, epochs, [runs[0], other], "black", "a")
    (line,) = axis.get_lines()
    assert line.get_xdata() == pytest.approx([0.6, 1.1, 1.6, 2.1])


def test_a_run_that_is_not_over_is_named(tmp_path):
    """One that was stopped, and one that was started again since it diverged."""
    stopped = write_run(tmp_path / "stopped", 0.9)
    write_events(stopped / "metrics.jsonl", read_events(stopped / "metrics.jsonl")[:-1])
    again = break_down(write_run(tmp_path / "again", 0.9), 3)
    timing = again / "timing.jsonl"
    write_events(timing, [*read_events(timing), {"event": "start"}])
    for folder in (stopped, again):
        with pytest.raises(ValueError, match=f"{folder.name} .* stands at example 150 of 200"):
            logs.read_run(folder)


@pytest.mark.parametrize("starts, wholes, seconds", [
    (1, [(10, 0.2, 0.3)], 5), (2, [(10, 0.2, 0.3), (4, 0.5, 0.25)], 6),
    (2, [(10, 0.2, 0.3)], None), (1, [], None), (0, [], None),
])
def test_training_seconds_are_of_all_starts_or_not_said(tmp_path, starts, wholes, seconds):
    """A start that was killed says nothing of its time."""
    run = logs.read_run(write_run(tmp_path / "run", 0.9))
    timing = [{"event": "start"}] * starts + [
        {"event": "time_share", "wall_seconds": wall, "time_share":
            {"update": 0.1, "evaluation": evaluation, "compile": compiling}}
        for wall, evaluation, compiling in wholes]
    assert run._replace(timing=timing).training_seconds == pytest.approx(seconds)


def test_errors_are_one_line_and_2_for_a_mistake_in_what_was_asked(tmp_path, capsys):
    def ends(act):
        with pytest.raises(SystemExit) as ended, one_line_errors("program"):
            act()
        return ended.value.code, capsys.readouterr().err

    def fail():
        raise RuntimeError("broken")

    status, said = ends(lambda: logs.read_run(tmp_path))
    assert status == 2 and re.fullmatch("program: .*no run was made here.\n", said)
    assert ends(lambda: schedule.find_phase([], "last", "--flag"))[0] == 2
    assert ends(fail) == (1, "program: broken\n")
    assert ends((tmp_path / "none").read_text)[0] == 1
    with pytest.raises(ValueError, match="invalid literal"), one_line_errors("program"):
        int("a bug")


def test_losses_are_means_over_stretches_of_a_run(tmp_path):
    """400 updates in 40 stretches: ten each, of losses 1/update."""
    run = logs.read_run(write_run(tmp_path / "run", 0.9, 400))
    updates, losses = drawing.points(run, "train_loss", "update")
    np.testing.assert_allclose(losses, [
        sum(1 / u for u in range(10 * k + 1, 10 * k + 11)) / 10 for k in range(40)])
    np.testing.assert_allclose(updates, 5.5 + 10 * np.arange(40))
    np.testing.assert_allclose(drawing.points(run, "train_loss", "epoch")[0], updates / 2)


@pytest.mark.parametrize("schedules", [2, 20])
def test_a_picture_is_drawn_of_as_many_schedules_as_are_given(tmp_path, monkeypatch, schedules):
    """By the command; each of its own colour."""
    folders = [write_run(tmp_path / str(seed), 0.9, seed=seed) for seed in (0, 1)]
    names = [f"schedule{number}" for number in range(schedules)]
    monkeypatch.setattr("sys.argv", [
        "curves", f"--output={tmp_path / 'out'}", "--title=all of them",
        *(f"{name}={','.join(map(str, folders))}" for name in names)])
    curves.main()
    pixels = np.asarray(Image.open(tmp_path / "out" / "curves.png").convert("RGB"))
    assert min(pixels.shape[:2]) > 500
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 100
    assert [row[0] for row in rows_of((tmp_path / "out" / "table.md").read_text())[1:]] == names
    assert len({tuple(np.atleast_1d(colour)) for colour in drawing.colours(schedules)}) == schedules


@pytest.mark.parametrize("other, said", [
    ({"optimizer": {"weight_decay": 0.1}}, "config.optimizer.weight_decay is 0.0 in one and 0.1"),
    # An absent key, of an older version, counts as its default.
    ({"log_every_epochs": 1.0}, "config.log_every_epochs is 0.1 in one and 1.0"),
    ({"seed": 3, "microbatches": 2}, ""),  # the same curve, by what bigbatch promises
])
def test_runs_of_one_name_are_seeds_of_one_config(tmp_path, monkeypatch, capsys, other, said):
    first = {"seed": 0, "optimizer": {"weight_decay": 0.0}}
    folders = [write_run(tmp_path / name, 0.9, **config)
               for name, config in (("0", first), ("1", first | other))]
    monkeypatch.setattr("sys.argv", [
        "curves", f"--output={tmp_path / 'out'}", f"decay={folders[0]},{folders[1]}"])
    if not said:
        return curves.main()
    with pytest.raises(SystemExit) as ended:
        curves.main()
    told = capsys.readouterr().err
    assert ended.value.code == 2 and told.count("\n") == 1
    assert f"the runs of decay differ in more than their seed: {said}" in told
