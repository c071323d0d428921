"""The paper's figures from one command, by real runs of the quickest scale."""

import re
import shlex
import shutil
import signal
import sys
import tarfile
import threading

import numpy as np
import pytest

from bigbatch.mistake import Mistake
from bigbatch.storage.logs import read_events
from experiments import (
    digitised,
    drawing,
    figures,
    logs,
    machine,
    provenance,
    records,
    reproduce,
    runs,
    selection,
    tables,
)
from tests.support import made_up_runs
from tests.support.started import end, start_python, wait_until
from tests.support.tables import rows_of

# Figure 6 is the quickest: two curves.
COMMAND = ("-m", "experiments.reproduce", "--scale=digits", "--seeds=1")


def refused(monkeypatch, capsys, *arguments):
    """What the command says as it ends; in this process, which has imported everything already."""
    monkeypatch.setattr("sys.argv", [*COMMAND[1:], *arguments])
    with pytest.raises(SystemExit) as ended:
        reproduce.main()
    assert ended.value.code == 2  # a mistake in what was asked
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Figure 6 trained, after a SIGTERM in the middle of it; with a record."""
    workdir = tmp_path_factory.mktemp("reproduce")
    arguments = ("--figure=6", f"--workdir={workdir}", f"--record={workdir / 'record'}")
    child = start_python(*COMMAND, *arguments)
    wait_until(lambda: list(workdir.glob("runs/*/metrics.jsonl")), child, "a run that trains")
    child.send_signal(signal.SIGTERM)
    assert "the same command goes on from here" in end(child, 1)
    # Whatever was training has saved, and nothing is left over that still trains.
    begun = {path.parent: path for path in workdir.glob("runs/*/metrics.jsonl")}
    assert all(list((folder / "checkpoints").glob("[0-9]*")) for folder in begun)
    assert not (workdir / "report.html").exists()
    end(start_python(*COMMAND, *arguments))
    return workdir


def test_cut_runs_go_on_and_everything_is_drawn(made):
    starts = [
        event for timing in made.glob("runs/*/timing.jsonl")
        for event in read_events(timing) if event["event"] == "start"
    ]
    assert len(starts) > 2 and any(event["examples_seen"] for event in starts)
    assert len(provenance.read(made)) == 2
    for name in ("figure_6.png", "tables.md", "report.md", "report.html"):
        assert (made / name).stat().st_size > 500, name
    report = (made / "report.html").read_text()
    # Self-contained: nothing is fetched; it has the commands.
    assert not re.search(r"(?:src|href)=[\"']?(?:https?:)?//", report)
    assert "url(" not in report and "<script" not in report
    assert "data:image/png;base64," in report
    for training in provenance.read(made):
        assert training["revision"] in report and training["hardware"] in report
    assert "--config=configs/small.py:figure6_increase,data=digits,seed=SEED" in report
    assert "1,152 (2.5x fewer)" in report


def test_finished_runs_are_left_alone(made, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in made.glob("runs/*/*")}
    monkeypatch.setattr("sys.argv", [*COMMAND[1:], "--figure=6", f"--workdir={made}"])
    reproduce.main()
    assert {path: path.stat().st_mtime_ns for path in made.glob("runs/*/*")} == before
    assert len(provenance.read(made)) == 2  # nothing was trained


def test_a_record_says_what_its_workdir_says(made, tmp_path):
    record = tmp_path / "record"
    shutil.copytree(made / "record", record)
    (record / "tables.md").unlink()
    reproduce.draw(selection.select("6", "digits"), "digits", 1, record, tmp_path / "drawn")
    assert (tmp_path / "drawn" / "tables.md").read_text() == (made / "tables.md").read_text()
    with records.opened(record) as folder:
        for run in made.glob("runs/*"):
            kept = logs.read_run(folder / "runs" / run.name)
            lived = logs.read_run(run)
            assert kept._replace(timing=None) == lived._replace(timing=None)
            assert kept.seconds == pytest.approx(lived.seconds, abs=0.01)
            assert kept.training_seconds == lived.training_seconds
            assert 0 < kept.training_seconds < kept.seconds
    records.keep(made, list(made.glob("runs/*")), tmp_path / "again")
    assert (tmp_path / "again" / records.ARCHIVE).read_bytes() == (
        record / records.ARCHIVE).read_bytes()


def test_the_commands_of_what_is_missing_are_printed(made, tmp_path, monkeypatch, capsys):
    """One a line, for a shell: those of the second seed; nothing is trained, drawn or noted."""
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    data_dir, output = tmp_path / "a folder", tmp_path / "none"
    monkeypatch.setattr("sys.argv", [
        *COMMAND[1:], "--figure=6", f"--workdir={made}", "--seeds=2", f"--data_dir={data_dir}",
        f"--output={output}", "--print_commands"])
    reproduce.main()
    printed = capsys.readouterr()
    assert "2 of 4 runs are over already" in printed.err
    assert [shlex.split(line) for line in printed.out.splitlines()] == [
        [sys.executable, "-m", "bigbatch.main",
         f"--config=configs/small.py:{preset},data=digits,seed=1", f"--config.data.dir={data_dir}",
         f"--workdir={made}/runs/{preset}_data=digits_seed=1"]
        for preset in ("figure6_decay", "figure6_increase")]
    assert {path: path.stat().st_mtime_ns for path in made.rglob("*")} == before
    assert not output.exists()


@pytest.mark.parametrize("arguments, said", [
    (("--figure=6", "--draw_only", "--seeds=2"),
     "/copy cannot be drawn from: it has no runs/figure6_decay_data=digits_seed=1. Of these curves "
     "it has 1 of 2 seeds: give --seeds=1."),
    (("--figure=5", "--draw_only", "--seeds=1"),
     "it has no runs/decay_data=digits_seed=0. --curve=NAME draws a figure without the others"),
    (("--figure=6", "--curve=decay"),
     "--curve is 'decay'; the curves of these figures are figure6_decay; figure6_increase."),
    (("--figure=6", "--scale=small"), "holds a run of another config"),
    (("--figure=6", "--draw_only", "--workdir=none"), "none holds neither runs nor runs.tar.gz"),
    (("--figure=9",), "--figure names '9'"),
    (("--figure=6", "--scale=medium"), "at the scale medium there are 1, 2, 2a, 2b, 3, 3a, 5"),
    (("--figure=6", "--seeds=0"), "--seeds is 0"),
    (("--figure=6", "--at_once=-1"), "--at_once is -1"),
    (("--figure=6", "--record=runs", "--output=runs"), "neither --workdir nor --output"),
    (("--figure=6", "--output=README.md"), "README.md can be no folder: File exists"),
    (("--figure=6", "--config.ghost_size=64"), "ghost_size=64 is not known here. Every run can be"),
    (("--figure=6", "--config.microbatches"), "--config.microbatches is not known here"),
    (("--figure=6", "--config.microbatches=two"), "config.microbatches takes a whole number"),
    (("--figure=6", "--draw_only", "--output=experiments/records/2026-11-26_h200"),
     "2026-11-26_h200, a record, which stays as it was published"),
])
def test_what_cannot_be_drawn_is_one_line(made, tmp_path, monkeypatch, capsys, arguments, said):
    workdir = tmp_path / "copy"
    for run in made.glob("runs/*"):
        renamed = run.name.replace("_data=digits", "") if "small" in str(arguments) else run.name
        shutil.copytree(run, workdir / "runs" / renamed, ignore=lambda *_: ["checkpoints"])
    told = refused(monkeypatch, capsys, f"--workdir={workdir}", *arguments)
    assert said in told and told.startswith("experiments.reproduce: "), told
    assert told.count("\n") == 1
    assert not (workdir / "report.html").exists()


def test_a_record_stays_as_it_was_published(made, tmp_path, monkeypatch, capsys):
    """It is drawn into another folder; of some of its curves, and against updates, if asked for."""
    record = tmp_path / "record"
    shutil.copytree(made / "record", record)
    before = {path: path.read_bytes() for path in record.iterdir()}
    asked = ("--figure=6a", f"--workdir={record}")
    for flags in ((), ("--draw_only",), (f"--output={tmp_path}",), ("--print_commands",)):
        told = refused(monkeypatch, capsys, *asked, *flags)
        assert f"--workdir is {record}, a record; give --draw_only and --output=FOLDER" in told
    told = refused(monkeypatch, capsys, *asked, "--draw_only", f"--output={tmp_path / 'drawn'}",
                   "--seeds=3")
    assert f"{record} cannot be drawn from" in told and "1 of 3 seeds: give --seeds=1" in told
    monkeypatch.setattr("sys.argv", [
        *COMMAND[1:], *asked, "--draw_only", f"--output={tmp_path / 'drawn'}",
        "--curve=figure6_increase", "--against_updates"])
    reproduce.main()
    labels = {row[0] for row in rows_of((tmp_path / "drawn" / "tables.md").read_text())}
    assert "increasing batch size" in labels and "decaying learning rate" not in labels
    assert before == {path: path.read_bytes() for path in record.iterdir()}


def test_a_record_with_a_stopped_run_is_named_as_it_is_known(made, tmp_path, monkeypatch, capsys):
    """Not by the folder in which it was unpacked, which is gone by then."""
    with records.opened(made / "record") as folder:
        path = next(folder.glob("runs/*decay*")) / "metrics.jsonl"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
        (tmp_path / "record").mkdir()
        with tarfile.open(tmp_path / "record" / records.ARCHIVE, "w:gz") as archive:
            archive.add(folder / "runs", "runs")
    told = refused(monkeypatch, capsys, "--figure=6", f"--workdir={tmp_path / 'record'}",
                   "--draw_only", f"--output={tmp_path / 'drawn'}")
    assert f"{tmp_path}/record/runs/figure6_decay_data=digits_seed=0 holds a run that st" in told


def test_a_run_that_diverges_is_a_result(made, tmp_path, monkeypatch, capsys):
    """A finished curve, one that diverges after an evaluation, one before anything is logged."""
    later, at_once = (
        figures.Curve(name, f"figure6_decay,recipe.learning_rate={rate}", claim="same")
        for name, rate in (
            ("later", "100,recipe.warmup_epochs=5,recipe.warmup_learning_rate=0.01"),
            ("at once", "1e6")))
    first = figures.FIGURE_6[0]
    panel = figures.FIGURES["6"].panels[0]._replace(curves=(first, later, at_once))
    figure = figures.FIGURES["6"]._replace(panels=(panel,))
    monkeypatch.setitem(figures.FIGURES, "6", figure)
    workdir, record = tmp_path / "work", tmp_path / "record"
    shutil.copytree(made, workdir, ignore=lambda *_: ["record", "report.html", "checkpoints"])
    monkeypatch.setattr("sys.argv", [
        *COMMAND[1:], "--figure=6", f"--workdir={workdir}", f"--record={record}",
        f"--data_dir={tmp_path}"])
    reproduce.main()
    said = capsys.readouterr().out
    assert said.count("DIVERGED") == 2 and "FAILED" not in said
    texts = [figures.config_text("digits", panel, curve, 0) for curve in panel.curves]
    whole, *broken = (logs.read_run(reproduce.folder_of(workdir, text)) for text in texts)
    assert not whole.diverged and len(broken[0].events) > 20 and not broken[1].events
    assert 1 < broken[0].diverged["epoch"] < 3 and broken[1].diverged["epoch"] < 0.03
    for curve, run in zip((later, at_once), broken, strict=True):
        (cells,) = [row for row in rows_of((workdir / "tables.md").read_text())
                    if row[0] == curve.label]
        assert f"1 of 1 diverged at epoch {run.diverged['epoch']:.3g}" in cells
        assert "none: a run diverged" in cells
    report = (workdir / "report.html").read_text()
    for curve, directory in ((first, ""), (later, f"--config.data.dir={tmp_path} ")):
        assert (f"python -m bigbatch.main --config=configs/small.py:{curve.config},data=digits,"
                f"seed=SEED {directory}--workdir=DIR") in report
    # The same command again trains none of them, and a record has them all.
    reproduce.main()
    assert "3 of 3 runs are over already, 2 of them diverged" in capsys.readouterr().out
    reproduce.draw([figure], "digits", 1, record, tmp_path / "drawn")
    assert (tmp_path / "drawn" / "tables.md").read_text() == (workdir / "tables.md").read_text()


def write_run(folder, accuracies, losses):
    """The logs of a finished run, evaluated at each of its updates."""
    return logs.read_run(made_up_runs.write_run(folder, accuracies, losses))


def broken(run, updates):
    """A run as if it had diverged after so many updates."""
    return run._replace(
        events=run.events[:updates],
        timing=[*run.timing, {"event": "diverged", "updates": updates, "epoch": updates / 5}])


def test_a_tables_numbers(tmp_path):
    """Final values, differences and verdicts, from runs that are written out here."""
    (panel,) = figures.FIGURES["5"].panels
    results = {}
    for number, curve in enumerate(panel.curves):
        results[curve.config] = [
            write_run(tmp_path / f"{number}-{seed}", [0.5] * 9 + [0.7 + 0.01 * seed - 0.1 * number],
                      [1.0] * 9 + [0.3])
            for seed in (0, 1)
        ]
    first, second, *_ = tables.rows(panel, "paper", results)
    assert first.values == pytest.approx([0.7, 0.71]) and first.stated == [0.943]
    assert first.comparison is None and first.inside is False
    assert first.paper == "94.3 % (median of five more, from memory: 94.3 %)"
    assert second.comparison.difference == pytest.approx(-0.1)
    assert second.comparison.verdict == "lower" and second.curve.claim == "same"
    (table,) = tables.make(figures.FIGURES["5"], "paper", results)
    row = dict(zip(table.header, table.cells[1], strict=True))
    assert row["final test accuracy"] == "60.50 ± 0.71 %" and row["n"] == "2"
    assert row["of the paper's recipe"] == "29,189 (2.7x fewer)"
    assert row["ours less the paper's"] == "-33.90 points"
    run = results[panel.curves[0].config][0]
    assert tables.final_value(run, "train_loss") == pytest.approx(0.3)  # of the last tenth alone


def test_a_curve_with_a_diverged_run_gets_no_verdict(tmp_path):
    """Nor do others against it; and the mean is of the runs that finished, as is said."""
    (panel,) = figures.FIGURES["5"].panels
    whole = [write_run(tmp_path / str(seed), [0.5] * 9 + [0.94 + 0.01 * seed], [1.0] * 10)
             for seed in (0, 1, 2)]
    first, second, *_ = panel.curves

    def table(*diverged):
        results = dict.fromkeys([curve.config for curve in panel.curves], whole)
        results |= {curve.config: [whole[0], broken(whole[1], 4), whole[2]] for curve in diverged}
        (made,) = tables.make(figures.FIGURES["5"], "paper", results)
        return [dict(zip(made.header, cells, strict=True)) for cells in made.cells]

    verdicts = [row["verdict"] for row in table()]
    assert verdicts == ["the reference", "same", "same", "same"]
    rows = table(second)
    assert [row["verdict"] for row in rows] == [
        "the reference", "none: a run diverged", "same", "same"]
    assert rows[1]["n"] == "3" and rows[1]["updates"] == "10"
    assert rows[1]["final test accuracy"] == "95.00 ± 1.41 %; 1 of 3 diverged at epoch 0.8"
    assert rows[1]["the paper's inside ours"] == rows[1]["ours less the paper's"] == ""
    assert rows[2]["the paper's inside ours"] == "yes"
    assert [row["verdict"] for row in table(first)] == [
        "the reference", *["none: a run diverged"] * 3]


def test_the_thirty_minutes_are_told_where_they_are_known(tmp_path):
    figure = figures.FIGURES["30min"]
    run = write_run(tmp_path / "run", [0.7] * 10, [1.0] * 10)

    def timed(seconds):
        return run._replace(timing=[
            {"event": "start", "devices": 8, "device_kind": "TPU v3"},
            {"event": "time_share", "wall_seconds": seconds + 10,
             "time_share": {"evaluation": 4 / (seconds + 10), "compile": 6 / (seconds + 10)}}])

    results = {curve.config: [run, run] for curve in figure.panels[0].curves}
    (table,) = tables.make(figure, "small", results)
    assert "training took" not in table.header
    first, second, third = results
    results |= {first: [timed(1790), timed(1810)], second: [timed(20), timed(21)],
                third: [timed(20), run]}
    (table,) = tables.make(figure, "small", results)
    column = table.header.index("training took")
    assert [cells[column:column + 2] for cells in table.cells] == [
        ["30.0 min", "under 45 min"], ["20.5 s", "under 30 min"], ["", "22 min"]]
    assert "8 x TPU v3" in table.note and "without compiling and evaluating" in table.note


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Two made-up runs of every curve."""
    folder, made = tmp_path_factory.mktemp("written"), {}
    for figure in figures.FIGURES.values():
        for panel in figure.panels:
            for curve in panel.curves:
                if curve.config not in made:
                    runs_of = [
                        write_run(folder / f"{len(made)}-{seed}",
                                  [0.1 * u for u in range(1, 11)],
                                  [2.0 / u + 0.1 * seed for u in range(1, 11)])
                        for seed in (0, 1)
                    ]
                    for run in runs_of:
                        run.phases[0] |= {"lost_epochs": 0.1 + len(made), "batch_size": 10}
                    made[curve.config] = runs_of
    return made


# Of image networks, but for those of what is measured, which have a test of their own.
OF_IMAGES = [name for name, figure in figures.FIGURES.items()
             if figure.panels[0].family in figures.FAMILIES and "noise" not in name]


@pytest.mark.parametrize("scale", ["paper", "small"])
@pytest.mark.parametrize("name", OF_IMAGES)
def test_a_figure_shows_its_curves_and_the_papers_points(written, name, scale):
    figure = figures.FIGURES[name]
    picture = drawing.draw(figure, scale, written)
    if not figure.trained:
        assert len(picture.axes) == 3 and all(len(axis.patches) == 3 for axis in picture.axes)
        return
    for column, panel in enumerate(figure.panels):
        axis = picture.axes[column]
        lines = {line.get_label().split(" (")[0]: line for line in axis.get_lines()
                 if not line.get_label().endswith("(paper)")}
        for number, curve in enumerate(panel.curves):
            line = lines[curve.label] if name != "B" else axis.get_lines()[-1]
            if name == "B":  # one point a curve: the mean of the last values
                assert line.get_ydata()[number] == pytest.approx(1.0)
                continue
            across = [10 * u / (50 if panel.axis == "epoch" else 10) for u in range(1, 11)]
            expected = {"test_accuracy": [0.1 * u for u in range(1, 11)],
                        "train_loss": [2.0 / u + 0.05 for u in range(1, 11)]}[panel.quantity]
            assert line.get_xdata() == pytest.approx(across)
            assert line.get_ydata() == pytest.approx(expected)
        segments = {
            (*line.get_xdata(), *line.get_ydata())
            for where in (picture.axes if scale == "small" else [axis])
            for line in where.get_lines() if len(line.get_xdata()) == 2
        }
        points = {(p.start, p.end, p.mean, p.mean) for p in digitised.read()
                  if p.panel == panel.name}
        assert points <= segments
        # What the paper states of its curves' ends; over our curves at its scale.
        stated = {float(value) for where in (picture.axes if scale == "small" else [axis])
                  for line in where.get_lines() if line.get_marker() == "D"
                  for value in line.get_ydata()}
        finals = {final for curve in panel.curves for final in curve.finals}
        assert stated == (finals if points or scale == "paper" else set())


def test_the_papers_last_curve_of_figure_5_is_shown_where_it_ended(written):
    """2 352 updates, 93.3 %, in the axes of our own curves at the paper's scale."""
    (axis,) = drawing.draw(figures.FIGURES["5"], "paper", written).axes
    assert (2352, 0.933) in [(x, y) for line in axis.get_lines() if line.get_marker() == "D"
                             for x, y in zip(*line.get_data(), strict=True)]


@pytest.mark.parametrize("name, number", [("A", 0), ("3", 2), ("1", 1)])
def test_a_figure_is_drawn_of_one_of_its_curves(written, name, number):
    """Also one that compares the others with its first; against updates beside it."""
    curve = figures.FIGURES[name].panels[0].curves[number]
    (figure,) = selection.only(selection.select(name, "small"), [curve.config])
    picture = drawing.draw(figure, "small", written)
    assert picture.axes[0].get_legend().get_texts()[0].get_text().startswith(curve.label)
    made = tables.make(figure, "small", written)
    assert len(made) == figure.trained
    if name == "3":
        doubled = selection.beside_updates(figure)
        assert [panel.axis for panel in doubled.panels] == ["epoch", "update"]
        ours = drawing.draw(doubled, "small", written).axes
        runs_of = written[curve.config]
        assert list(ours[1].get_lines()[0].get_xdata()) == list(
            drawing.points(runs_of[0], "test_accuracy", "update")[0])
        assert tables.make(doubled, "small", written) == made
    else:
        with pytest.raises(ValueError, match=f"figure {name} has none"):
            selection.beside_updates(figure)


@pytest.mark.parametrize("name", [name for name in OF_IMAGES if name != "1"])
def test_a_figure_is_drawn_beside_runs_that_diverged(written, name):
    """One of the first curve's, all of the last's; means are of the others."""
    figure = figures.FIGURES[name]
    (panel, *_), results = figure.panels, dict(written)
    first, last = panel.curves[0].config, panel.curves[-1].config
    results[first] = [broken(written[first][0], 3), written[first][1]]
    results[last] = [broken(written[last][0], 3), broken(written[last][1], 0)]
    picture = drawing.draw(figure, "small", results)
    axis = picture.axes[0]
    crosses = sum(line.get_marker() == "x" for line in axis.get_lines())
    assert crosses == (2 if name == "B" else 3)  # there one a rate
    legend = " ".join(text.get_text() for text in axis.get_legend().get_texts())
    assert "1 of 2 diverged at epoch 0.6" in legend
    assert "2 of 2 diverged at epoch 0.6, 0" in legend
    if name == "B":
        assert np.isnan(axis.get_lines()[-1].get_ydata()).tolist() == [False] * 5 + [True]
    else:
        lines = {line.get_label().split(" (")[0]: line for line in axis.get_lines()}
        _, whole = drawing.points(written[first][1], panel.quantity)
        assert lines[panel.curves[0].label].get_ydata() == pytest.approx(whole)
        assert not len(lines[panel.curves[-1].label].get_ydata())
    text = "".join(tables.markdown(table) for table in tables.make(figure, "small", results))
    assert "1 of 2 diverged at epoch 0.6" in text and "2 of 2 diverged at epoch 0.6, 0" in text
    assert "nan" not in text


def test_a_failed_run_does_not_keep_others_from_ending(tmp_path):
    """The first of three fails at once and is told; the others train to their end."""
    tiny = "tests/support/small_config.py:resident"
    broken = f"{tiny},data.name=tests.experiments.test_reproduce.broken_data"
    wanted = [runs.Run(broken, tmp_path / "fails")]
    wanted += [runs.Run(f"{tiny},seed={seed}", tmp_path / f"run{seed}") for seed in (0, 1)]
    said, data_dir = [], tmp_path / "no data"
    with pytest.raises(RuntimeError, match="1 of 3 runs failed") as failed:
        runs.train(wanted, [f"--config.data.dir={data_dir}"], 2, said.append)
    assert "RuntimeError: the disk is gone" in str(failed.value)
    assert (f"python -m bigbatch.main --config={broken} "
            f"'--config.data.dir={data_dir}' --workdir={wanted[0].workdir} ended with status 1"
            ) in str(failed.value)
    assert [runs.is_over(run) for run in wanted] == [False, True, True]
    assert sum("FAILED" in line for line in said) == 1


def broken_data(data):
    raise RuntimeError("the disk is gone")


def test_a_mistake_that_runs_share_ends_them_after_the_first(tmp_path):
    """One that is under way saves and ends, and no more are started."""
    tiny = "tests/support/small_config.py:resident"
    wanted = [runs.Run(f"{tiny},recipe.epochs=1e6", tmp_path / "long")]
    wanted += [runs.Run(f"configs/small.py:decay,seed={seed}", tmp_path / f"run{seed}")
               for seed in range(3)]
    said = []
    with pytest.raises(Mistake, match="there is no such folder.*seed=0.* no other run") as refused:
        runs.train(wanted, [f"--config.data.dir={tmp_path / 'nowhere'}"], 2, said.append)
    assert "\n" not in str(refused.value) and said == []
    assert not (tmp_path / "run1").exists()


def test_after_a_stop_nothing_more_is_started(tmp_path):
    """Of two runs one by one, the first is told to save and the second never begins."""
    machine.jax_devices()  # asked before: what comes to this process then, comes while runs train
    wanted = [
        runs.Run(f"tests/support/small_config.py:resident,seed={seed}", tmp_path / f"run{seed}")
        for seed in (0, 1)]
    timer = threading.Timer(1.0, signal.raise_signal, [signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        runs.train(wanted, [], 1)
    assert not wanted[1].workdir.exists()


def test_figure_1_needs_no_runs(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", [*COMMAND[1:], "--figure=1", f"--workdir={tmp_path / 'new'}"])
    reproduce.main()
    assert (tmp_path / "new" / "report.html").exists()
