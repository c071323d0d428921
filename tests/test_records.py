"""README's results are those of the records it names, drawn again from their logs."""

import json
import re

import pytest

from experiments import curves, demo, figures, provenance, records, reproduce, tables
from experiments.speed import measure
from experiments.speed import table as speed_table
from tests.processes import REPOSITORY

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
SMALL = REPOSITORY / "experiments" / "records" / "2026-11-25_small"
DEMO = REPOSITORY / "experiments" / "records" / "2026-11-26_demo"
SPEED = REPOSITORY / "experiments" / "records" / "2026-11-26_speed.json"


def rows_below(header):
    """The cells of README's table that begins with `header`."""
    table = README[README.index(header):].split("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")]
            for line in table.splitlines()[2:]]


def test_every_record_that_is_named_is_there():
    named = set(re.findall(r"experiments/records/[\w./-]*\w", README))
    assert len(named) > 3
    missing = [name for name in named if not (REPOSITORY / name).exists()]
    assert not missing


def test_the_results_table_is_the_records():
    with records.opened(SMALL) as folder:
        results = reproduce.read(figures.select("all"), "small", 3, folder, SMALL)
    made = tables.summary(figures.select("all"), "small", results)
    shown = rows_below("| figure | schedule |")
    assert len(shown) > 10
    assert [row for row in shown if row not in made.cells] == []
    tabulated = (SMALL / "tables.md").read_text(encoding="utf-8")
    for figure in figures.FIGURES.values():
        for table in tables.make(figure, "small", results):
            assert tables.markdown(table) in tabulated


def test_the_demonstrations_table_is_the_records():
    with records.opened(DEMO) as folder:
        table = curves.table({
            preset: [curves.read_run(folder / "runs" / f"{preset}-{seed}") for seed in range(3)]
            for preset in demo.PRESETS
        })
    shown = rows_below("| schedule | seeds |")
    assert len(shown) == 3
    assert [row for row in shown if f"| {' | '.join(row)} |" not in table] == []


def test_the_table_of_speeds_is_the_records():
    record = json.loads(SPEED.read_text(encoding="utf-8"))
    made = speed_table.markdown(
        [measure.Figure(**{name: figure[name] for name in measure.Figure._fields})
         for figure in record["figures"]], record["hardware"]).splitlines()
    assert re.match(r"[0-9a-f]{40}$", record["revision"]), "measured with uncommitted code"
    shown = README[README.index(made[0]):].split("\n\n")[0].splitlines()
    assert len(shown) > 10
    assert [line for line in shown if line not in made] == []


@pytest.mark.parametrize("record", [SMALL, DEMO], ids=lambda path: path.name)
def test_a_record_says_how_it_was_made(record):
    trainings = provenance.read(record)
    assert trainings
    for training in trainings:
        assert training["command"].startswith("python -m experiments.")
        assert re.match(r"[0-9a-f]{40}$", training["revision"]), "made from uncommitted code"
        assert training["hardware"] and training["versions"]["jax"] and training["configs"]


def test_the_h200s_results_are_the_records():
    folder = REPOSITORY / "experiments" / "records" / "2026-11-26_h200"
    speed = json.loads(folder.with_name("2026-11-26_h200_speed.json").read_text(encoding="utf-8"))
    pages = [README, *((REPOSITORY / "docs" / page).read_text(encoding="utf-8")
                       for page in ("reproduce.md", "speed.md"))]
    logs = {}
    with records.opened(folder) as unpacked:
        for preset, label in (("decay", "decaying learning rate"),
                              ("increase", "increasing batch size")):
            run = curves.read_run(unpacked / "runs" / f"{preset}_dtype=bfloat16_seed=0")
            logs[preset] = run.events
            seconds = sum(event["wall_seconds"] for event in run.timing
                          if event["event"] == "time_share")
            row = (f"| {run.updates:,} | {100 * run.events[-1]['test_accuracy']:.2f} % | 1 | "
                   f"{seconds:.0f} |")
            for page in pages[:2]:
                assert [line for line in page.splitlines()
                        if line.startswith(f"| 3a | {label} |") and line.endswith(row)]
    shared = [a for a, b in zip(logs["decay"], logs["increase"], strict=False) if a == b]
    assert len(shared) == 600 and shared[-1]["updates"] == 23_438
    for row in speed["by_batch"]:
        if row["run"] in logs:
            assert (f"| {row['milliseconds_an_update']:.2f} | {row['images_a_second']:,} | "
                    f"{100 * row['model_flop_utilisation']:.1f} % |") in pages[2]
    for made in (speed, *provenance.read(folder)):
        assert made["command"].startswith("python -m bigbatch.main ")
        assert re.match(r"[0-9a-f]{40}$", made["revision"])
