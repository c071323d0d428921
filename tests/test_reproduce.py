"""The paper's figures from one command, by real runs of the quickest scale."""

import json
import re
import shutil
import signal

import pytest

from experiments import curves, drawing, figures, provenance, records, reproduce, runs, tables
from tests.processes import end, start_python, wait_until

# Figure 6 is the quickest: two curves.
COMMAND = ("-m", "experiments.reproduce", "--scale=digits", "--seeds=1")


def refused(monkeypatch, *arguments):
    """What the command says as it ends; in this process, which has imported everything already."""
    monkeypatch.setattr("sys.argv", [*COMMAND[1:], *arguments])
    with pytest.raises(SystemExit) as ended:
        reproduce.main()
    return str(ended.value.code)


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
        for event in curves.read_events(timing) if event["event"] == "start"
    ]
    assert len(starts) > 2 and any(event["examples_seen"] for event in starts)
    assert len(provenance.read(made)) == 2
    for name in ("figure_6.png", "figure_6.svg", "tables.md", "report.html"):
        assert (made / name).stat().st_size > 500, name
    report = (made / "report.html").read_text()
    # Self-contained: nothing is fetched, and what was run is said.
    assert not re.search(r"(?:src|href)=[\"']?(?:https?:)?//", report)
    assert "url(" not in report and "<script" not in report
    assert "data:image/svg+xml;base64," in report
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
    reproduce.draw(figures.select("6"), "digits", 1, record, tmp_path / "drawn")
    assert (tmp_path / "drawn" / "tables.md").read_text() == (made / "tables.md").read_text()
    with records.opened(record) as folder:
        for run in made.glob("runs/*"):
            kept = curves.read_run(folder / "runs" / run.name)
            lived = curves.read_run(run)
            assert kept._replace(seconds=None) == lived._replace(seconds=None)
            assert kept.seconds == pytest.approx(lived.seconds, abs=0.01)
    records.keep(made, list(made.glob("runs/*")), tmp_path / "again")
    assert (tmp_path / "again" / records.ARCHIVE).read_bytes() == (
        record / records.ARCHIVE).read_bytes()


@pytest.mark.parametrize("arguments, said", [
    (("--figure=6", "--draw_only", "--seeds=2"), "seed=1 has no metrics.jsonl"),
    (("--figure=6", "--scale=small"), "holds a run of another config"),
    (("--figure=9",), "--figure names '9'"),
    (("--figure=6", "--seeds=0"), "--seeds is 0"),
    (("--figure=6", "--at_once=-1"), "--at_once is -1"),
])
def test_what_cannot_be_drawn_is_one_line(made, tmp_path, monkeypatch, arguments, said):
    workdir = tmp_path / "copy"
    for run in made.glob("runs/*"):
        renamed = run.name.replace("_data=digits", "") if "small" in str(arguments) else run.name
        shutil.copytree(run, workdir / "runs" / renamed, ignore=lambda *_: ["checkpoints"])
    told = refused(monkeypatch, *arguments, f"--workdir={workdir}")
    assert said in told and told.startswith("experiments.reproduce: "), told
    assert not (workdir / "report.html").exists()


def test_a_missing_record_is_named(tmp_path, monkeypatch):
    said = refused(monkeypatch, "--figure=6", "--draw_only", f"--workdir={tmp_path / 'none'}")
    assert "none holds neither runs nor runs.tar.gz" in said


def test_a_run_that_fails_is_told_with_its_command(tmp_path):
    run = runs.Run("configs/small.py:decay", tmp_path / "run")
    with pytest.raises(RuntimeError, match="there is no such folder") as failed:
        runs.train_all([run], [f"--config.data.dir={tmp_path / 'none'}"])
    assert "python -m bigbatch.main --config=configs/small.py:decay" in str(failed.value)


def write_run(folder, accuracies, losses, updates=10):
    """What a finished run of `updates` updates leaves, evaluated at each."""
    folder.mkdir(parents=True)
    events = [
        {"updates": u, "examples_seen": 10 * u, "epoch": u / 5, "batch_size": 10,
         "train_loss": losses[u - 1], "test_accuracy": accuracies[u - 1], "learning_rate": 0.1}
        for u in range(1, updates + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    (folder / "timing.jsonl").write_text(json.dumps({"event": "speed", "seconds": 2.5}) + "\n")
    (folder / "config.json").write_text(json.dumps(
        {"phases": [{"start_example": 0, "end_example": 10 * updates}]}))
    return curves.read_run(folder)


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
    assert first.values == pytest.approx([0.7, 0.71]) and first.paper_values == [0.943]
    assert first.comparison is None and first.inside is False and first.seconds == 2.5
    assert second.comparison.difference == pytest.approx(-0.1)
    assert second.comparison.verdict == "lower" and second.claim == "same"
    (table,) = tables.make(figures.FIGURES["5"], "paper", results)
    row = dict(zip(table.header, table.cells[1], strict=True))
    assert row["final test accuracy"] == "60.50 ± 0.71 %" and row["n"] == "2"
    assert row["of the paper's recipe"] == "29,189 (2.7x fewer)"
    assert row["ours less the paper's"] == "-33.90 points"
    run = results[panel.curves[0].config][0]
    assert tables.final_value(run, "train_loss") == pytest.approx(0.3)  # of the last tenth alone


@pytest.mark.parametrize("scale", ["paper", "small"])
def test_every_figure_can_be_drawn_at_every_scale(tmp_path, scale):
    made = {}
    for figure in figures.FIGURES.values():
        for panel in figure.panels:
            for curve in panel.curves:
                if curve.config not in made:
                    runs_of = [
                        write_run(tmp_path / f"{len(made)}-{seed}",
                                  [0.1 * u for u in range(1, 11)],
                                  [2.0 / u + 0.1 * seed for u in range(1, 11)])
                        for seed in (0, 1)
                    ]
                    for run in runs_of:
                        run.phases[0] |= {"lost_epochs": 0.1 + len(made), "batch_size": 10}
                    made[curve.config] = runs_of
        path = tmp_path / f"{figure.name}.png"
        drawing.draw(figure, scale, made, path)
        assert path.stat().st_size > 5000, figure.name
