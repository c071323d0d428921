"""Figures and tables are drawn from workdirs alone."""

import json
import re

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from bigbatch import schedule
from experiments import curves
from experiments.command_line import one_line_errors


def write_run(folder, final, batch=50, examples=100, epochs=2):
    """A finished run as a workdir holds it: two updates an epoch, loss 1/update."""
    folder.mkdir()
    events = [
        {"updates": u, "examples_seen": u * batch, "epoch": u * batch / examples,
         "batch_size": batch, "train_loss": 1 / u, "test_accuracy": final if u == 4 else 0.5}
        for u in range(1, 1 + epochs * examples // batch)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    timing = [{"event": "speed", "seconds": s} for s in (1.5, 2)] + [{"event": "save"}]
    (folder / "timing.jsonl").write_text("".join(json.dumps(e) + "\n" for e in timing))
    phases = [{"start_example": 0, "end_example": epochs * examples, "updates": len(events)}]
    (folder / "config.json").write_text(
        json.dumps({"config": {"data": {"train_examples": examples}}, "phases": phases}))
    return folder


def break_down(folder, updates, loss=1e12):
    """Makes a finished run one that diverged after so many updates, of a last loss that is huge."""
    events = curves.read_events(folder / "metrics.jsonl")[:updates]
    if events:
        events[-1]["train_loss"] = loss
    (folder / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    with (folder / "timing.jsonl").open("a") as file:
        for event in ({"event": "start", "devices": 1, "device_kind": "cpu"},
                      {"event": "diverged", "updates": updates, "epoch": updates / 2}):
            file.write(json.dumps(event) + "\n")
    return folder


def test_the_table_has_mean_and_deviation_of_the_last_evaluations(tmp_path):
    folders = [write_run(tmp_path / str(seed), 0.9 + 0.02 * seed) for seed in (0, 1, 2)]
    runs = [curves.read_run(folder) for folder in folders]
    row = curves.table({"decay": runs}).splitlines()[-1]
    assert row == "| decay | 3 | 92.00 ± 2.00 % | 4 | 3.5 |"


def test_a_run_that_diverged_is_in_no_mean_and_told(tmp_path):
    """Also one that diverged at once, which has no metrics.jsonl."""
    runs = [curves.read_run(write_run(tmp_path / "whole", 0.9))]
    runs += [curves.read_run(break_down(write_run(tmp_path / str(updates), 0.9), updates))
             for updates in (3, 0)]
    told = "2 of 3 diverged at epoch 1.5, 0"
    assert curves.table({"a": runs}).splitlines()[-1] == f"| a | 3 | 90.00 %; {told} | 4 | 3.5 |"
    assert curves.table({"a": runs[1:]}).splitlines()[-1].startswith("| a | 2 | 2 of 2 diverged ")
    figure = Figure()
    axis = figure.subplots()
    points = [curves.epoch_means(run.events, "train_loss") for run in runs]
    mean = curves.plot_runs(axis, runs, points, "epoch", "black", "a")
    assert mean.tolist() == points[0][1].tolist()
    line, *others = axis.get_lines()
    assert line.get_label() == f"a (4 updates; {told})"
    assert line.get_ydata().tolist() == mean.tolist()
    assert axis.get_ylim()[1] < 2  # the huge loss does not make the others flat
    crosses = [other.get_xdata() for other in others if other.get_marker() == "x"]
    assert [float(x[0]) for x in crosses] == [1.5, 0]
    assert [1.0, 2.0] in [list(other.get_xdata()) for other in others]  # as far as it came
    curves.draw({"a": runs, "b": runs[1:]}, tmp_path / "curves.png")


def test_a_run_that_was_started_since_it_diverged_is_not_over(tmp_path):
    folder = break_down(write_run(tmp_path / "run", 0.9), 3)
    with (folder / "timing.jsonl").open("a") as file:
        file.write(json.dumps({"event": "start"}) + "\n")
    with pytest.raises(ValueError, match="stands at example 150 of 200"):
        curves.read_run(folder)


@pytest.mark.parametrize("starts, wholes, seconds", [
    (1, [(10, 0.2, 0.3)], 5), (2, [(10, 0.2, 0.3), (4, 0.5, 0.25)], 6),
    (2, [(10, 0.2, 0.3)], None), (1, [], None), (0, [], None),
])
def test_training_seconds_are_of_all_starts_or_not_said(tmp_path, starts, wholes, seconds):
    """A start that was killed says nothing of its time."""
    run = curves.read_run(write_run(tmp_path / "run", 0.9))
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

    status, said = ends(lambda: curves.read_run(tmp_path))
    assert status == 2 and re.fullmatch("program: .*no run was made here.\n", said)
    assert ends(lambda: schedule.find_phase([], "last", "--flag"))[0] == 2
    assert ends(fail) == (1, "program: broken\n")
    assert ends((tmp_path / "none").read_text)[0] == 1
    with pytest.raises(ValueError, match="invalid literal"), one_line_errors("program"):
        int("a bug")


def test_losses_are_means_over_the_epoch_an_update_began_in(tmp_path):
    run = curves.read_run(write_run(tmp_path / "run", 0.9))
    epochs, losses = curves.epoch_means(run.events, "train_loss")
    assert epochs.tolist() == [1, 2]
    np.testing.assert_allclose(losses, [(1 + 1 / 2) / 2, (1 / 3 + 1 / 4) / 2])
    np.testing.assert_allclose(curves.at_updates(run, epochs), [2, 4])


def test_a_picture_is_drawn(tmp_path):
    runs = [curves.read_run(write_run(tmp_path / str(seed), 0.9)) for seed in (0, 1)]
    curves.draw({"a": runs, "b": runs[:1]}, tmp_path / "curves.png")
    pixels = np.asarray(Image.open(tmp_path / "curves.png").convert("RGB"))
    assert min(pixels.shape[:2]) > 500
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 100


def test_a_run_that_is_not_finished_or_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match="no run was made here"):
        curves.read_run(tmp_path)
    folder = write_run(tmp_path / "run", 0.9)
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:-1]))
    with pytest.raises(ValueError, match="stands at example 150 of 200"):
        curves.read_run(folder)
