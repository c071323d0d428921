"""Published records exist where pages name them, and are drawn again from their logs."""

import json
import re

import pytest
from PIL import Image

from experiments import (
    curves,
    deciding,
    demo,
    figures,
    logs,
    noise,
    provenance,
    records,
    reproduce,
)
from experiments.speed import measure, saves, split_updates
from tests import soak
from tests.support.started import REPOSITORY
from tests.support.tables import rows_of

RECORDS = REPOSITORY / "experiments" / "records"
SMALL, DEMO = RECORDS / "2026-11-26_small", RECORDS / "2026-11-26_demo"
DECIDING = {
    "digits": RECORDS / "2026-11-26_deciding", "cifar10": RECORDS / "2026-11-27_deciding_cifar10",
    "bytes": RECORDS / "2026-11-27_deciding_bytes",
}
COSINE = RECORDS / "2026-11-26_cosine"
LANGUAGE = RECORDS / "2026-11-26_language"
SPEED = RECORDS / "2026-11-26_speed.json"
NOISE = {scale: RECORDS / f"2026-11-26_noise_{scale}" for scale in ("digits", "small", "bytes")}
NOISE_COST = RECORDS / "2026-11-26_noise_cost.json"


def test_every_record_that_is_named_is_there():
    pages = [REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md")]
    text = "".join(page.read_text(encoding="utf-8") for page in pages)
    named = set(re.findall(r"experiments/records/[\w./-]*\w", text))
    assert len(named) > 3
    missing = [name for name in named if not (REPOSITORY / name).exists()]
    assert not missing


def test_no_sitting_of_the_soak_has_lost_anything(tmp_path):
    """And what stands at its top is the sum."""
    record = json.loads((RECORDS / "soak.json").read_text(encoding="utf-8"))
    for sitting in record["sittings"]:
        assert {sitting["counts"][loss] for loss in soak.LOSSES} == {0}
        assert sitting["counts"]["kills"] == sum(
            count for name, count in sitting["counts"].items() if name.startswith("kills: "))
    soak.add_to_record(tmp_path / "again.json", record["sittings"])
    assert json.loads((tmp_path / "again.json").read_text(encoding="utf-8")) == record
    assert record["total"]["kills"] >= 120 and record["total"]["corruptions"] >= 567
    assert {run for run in soak.RUNS if any(f"--run={run} " in sitting["command"]
                                            for sitting in record["sittings"])} >= {
        "language", "deciding"}


@pytest.mark.parametrize("setting", deciding.SETTINGS)
def test_runs_that_decide_are_compared_again_as_on_the_page(setting):
    """And what they are compared with takes as many updates."""
    results = deciding.read(DECIDING[setting])
    drawn = deciding.table(results, deciding.SETTINGS[setting].margin) + "\n"
    assert (DECIDING[setting] / "table.md").read_text(encoding="utf-8") == drawn
    page = (REPOSITORY / "docs" / "branches.md").read_text(encoding="utf-8")
    assert [row for row in rows_of(drawn) if row not in rows_of(page)] == []
    decided = results["measured"]
    assert results.keys() == deciding.SCHEDULES.keys() and len(decided) >= 5
    for seed, run in enumerate(decided):
        assert "grows_to" in {name for event in run.events for name in event}
        for name, settings in deciding.fixed(run, decided[seed - 1]).items():
            twin = results[name][seed]
            listed = ",".join(f"('{at}',{batch})" for at, batch in twin.config["by_hand"])
            assert settings == f"strategy=by_hand,by_hand=({listed},)"
            wanted = decided[seed - 1] if name == "anotherseedsdecisions" else run
            # One batch is a whole number of ghost batches, which are up to an eighth of it.
            assert abs(twin.updates / wanted.updates - 1) < (0.065 if name == "onebatch" else 0.01)


def test_the_small_scales_tables_are_drawn_again_from_its_logs(tmp_path):
    reproduce.draw(figures.select("all", "small"), "small", 3, SMALL, tmp_path)
    kept, drawn = ((folder / "tables.md").read_text(encoding="utf-8")
                   for folder in (SMALL, tmp_path))
    assert kept == drawn and len(rows_of(drawn)) > 60
    # Only of appendix B's rates no number of the paper's is known.
    assert drawn.count("not given") == len(figures.RATES)


def test_the_tables_beyond_the_paper_are_drawn_again_and_are_those_of_the_page(tmp_path):
    reproduce.draw(figures.select("cosine,exchange", "small"), "small", 3, COSINE, tmp_path)
    drawn = (tmp_path / "tables.md").read_text(encoding="utf-8")
    assert drawn == (COSINE / "tables.md").read_text(encoding="utf-8")
    found = {row[0]: row for row in rows_of(drawn) if len(row) > 8}
    page = (REPOSITORY / "docs" / "reproduce.md").read_text(encoding="utf-8")
    shown = [row for row in rows_of(page) if row[0] in ("cosine", "exchange")]
    assert len(shown) == 7
    for _, schedule, updates, accuracy, n, difference, verdict in shown:
        row = found[schedule]
        assert row[2].startswith(updates) and (row[1], row[5], row[7]) == (n, accuracy, difference)
        assert row[8] == (verdict or "the reference")


def test_the_demonstrations_table_is_drawn_again_from_its_logs(tmp_path):
    curves.draw(figures.DEMO, demo.read(DEMO), tmp_path)
    kept, drawn = ((folder / "table.md").read_text(encoding="utf-8")
                   for folder in (DEMO, tmp_path))
    assert kept == drawn and len(rows_of(drawn)) == 4


def test_the_page_on_speed_has_the_table_of_its_record():
    record = json.loads(SPEED.read_text(encoding="utf-8"))
    assert re.match(r"[0-9a-f]{40}$", record["revision"]), "measured with uncommitted code"
    # Records of version 0.1 call a measurement a figure.
    found = [measure.Measurement(*(row[name] for name in measure.Measurement._fields))
             for row in record["figures"]]
    page = rows_of((REPOSITORY / "docs" / "speed.md").read_text(encoding="utf-8"))
    made = rows_of(measure.markdown(found, record["hardware"]))
    assert len(made) > 20 and [row for row in made if row not in page] == []
    record = json.loads((RECORDS / "2026-11-26_language_speed.json").read_text(encoding="utf-8"))
    found = [measure.Measurement(*(row[name] for name in measure.Measurement._fields))
             for row in record["measurements"]]
    made = rows_of(measure.markdown(found, record["hardware"]))
    assert len(made) == 4 and [row for row in made if row not in page] == []


def test_the_language_models_table_is_drawn_again_and_is_that_of_the_page(tmp_path):
    reproduce.draw(figures.select("language", "bytes"), "bytes", 5, LANGUAGE, tmp_path)
    drawn = (tmp_path / "tables.md").read_text(encoding="utf-8")
    assert drawn == (LANGUAGE / "tables.md").read_text(encoding="utf-8")
    page = rows_of((REPOSITORY / "docs" / "reproduce.md").read_text(encoding="utf-8"))
    found = [row for row in rows_of(drawn) if row[-2] in ("the reference", "same", "higher")]
    assert len(found) == 5
    for row in found:
        shown = [row[0], row[2].partition(" (")[0], row[5], row[1], row[7],
                 "" if row[8] == "the reference" else row[8]]
        assert shown in page, shown


@pytest.mark.parametrize("scale", NOISE)
def test_the_measured_noise_is_drawn_again_and_is_that_of_the_page(scale, tmp_path):
    name, seeds = {"digits": ("noise", 2), "small": ("noise", 3), "bytes": ("noise_language", 1)}[
        scale]
    chosen = figures.select(name, scale)
    reproduce.draw(chosen, scale, seeds, NOISE[scale], tmp_path)
    drawn = (tmp_path / "tables.md").read_text(encoding="utf-8")
    assert drawn == (NOISE[scale] / "tables.md").read_text(encoding="utf-8")
    page = rows_of((REPOSITORY / "docs" / "noise.md").read_text(encoding="utf-8"))
    with records.opened(NOISE[scale]) as folder:
        found = reproduce.read(chosen, scale, seeds, folder, folder)
    fitted = noise.fit(
        [pair for runs in found.values() for run in runs for pair in noise.pairs(run)])
    shown = [row[1:] for row in page if row[0].startswith(f"{scale}:")]
    assert shown == [[str(len(found) * seeds), f"{fitted.points} of "
                      f"{fitted.points + fitted.without}",
                      *(f"{ratio:.2f}" for ratio in fitted.ratios), f"{fitted.agree:.0%}",
                      f"{fitted.factor:.2f} x^{fitted.power:.2f}", f"{fitted.spread:.2f}",
                      f"{fitted.correlation:.3f}"]]
    if scale == "small":
        rows = [row for row in rows_of(drawn) if len(row) == 8][1:]
        assert len(rows) == 8 and all(row in page for row in rows)


def test_what_measuring_the_noise_costs_is_the_records():
    cpu, *tpus = json.loads(NOISE_COST.read_text(encoding="utf-8"))
    page = rows_of((REPOSITORY / "docs" / "noise.md").read_text(encoding="utf-8"))
    for row in cpu["measurements"]:
        assert [row["setting"], cpu["hardware"], measure.spread(
            measure.Measurement(*(row[name] for name in measure.Measurement._fields))),
            str(len(row["values"]))] in page
    compiled = [row for made in tpus for row in made["compiled"]]
    assert len(compiled) == 3
    for row in compiled:
        assert [row["config"], f"{row['slice']}, by its compiler", f"{row['seconds_ratio']:.4f}",
                "1"] in page
        assert row["seconds_ratio"] < 1.01
    for made in (cpu, *tpus):
        assert re.match(r"[0-9a-f]{40}$", made["revision"]), "measured with uncommitted code"


def test_what_split_states_take_on_a_cpu_are_the_records():
    page = rows_of((REPOSITORY / "docs" / "sharding.md").read_text(encoding="utf-8"))
    updates, saved = (json.loads(module.RECORD.read_text(encoding="utf-8"))
                      for module in (split_updates, saves))
    rows = rows_of(split_updates.table(updates["measurements"])) + rows_of(saves.table(saved))
    assert [row for row in rows if row not in page] == []
    assert all(len(row["values"]) >= 9 for row in updates["measurements"])
    for made in (updates, *saved):
        assert made["command"].startswith("python -m experiments.speed.")
        assert re.match(r"[0-9a-f]{40}$", made["revision"]), "measured with uncommitted code"


@pytest.mark.parametrize("record", [
    SMALL, COSINE, LANGUAGE, DEMO, *NOISE.values(), *DECIDING.values()], ids=lambda path: path.name)
def test_a_record_says_how_it_was_made(record):
    trainings = provenance.read(record)
    assert trainings
    for training in trainings:
        assert training["command"].startswith("python -m experiments.")
        assert re.match(r"[0-9a-f]{40}$", training["revision"]), "made from uncommitted code"
        assert training["hardware"] and training["versions"]["jax"] and training["configs"]


def test_the_h200s_results_are_the_records(tmp_path):
    folder = RECORDS / "2026-11-26_h200"
    chosen = figures.only(figures.select("3a", "paper"), ["decay", "increase"])
    reproduce.draw(list(map(figures.beside_updates, chosen)), "paper", 1, folder, tmp_path)
    with Image.open(folder / "figure_3.png") as kept, Image.open(
            tmp_path / "figure_3.png") as drawn:
        assert kept.size == drawn.size
    speed = json.loads(folder.with_name("2026-11-26_h200_speed.json").read_text(encoding="utf-8"))
    pages = [(REPOSITORY / page).read_text(encoding="utf-8")
             for page in ("README.md", "docs/reproduce.md", "docs/speed.md")]
    events = {}
    with records.opened(folder) as unpacked:
        for preset, label in (("decay", "decaying learning rate"),
                              ("increase", "increasing batch size")):
            run = logs.read_run(unpacked / "runs" / f"{preset}_dtype=bfloat16_seed=0")
            events[preset] = run.events
            seconds = sum(event["wall_seconds"] for event in run.timing
                          if event["event"] == "time_share")
            row = (f"| {run.updates:,} | {100 * run.events[-1]['test_accuracy']:.2f} % | 1 | "
                   f"{seconds:.0f} |")
            for page in pages[:2]:
                assert [line for line in page.splitlines()
                        if line.startswith(f"| 3a | {label} |") and line.endswith(row)]
    shared = [a for a, b in zip(events["decay"], events["increase"], strict=False) if a == b]
    assert len(shared) == 600 and shared[-1]["updates"] == 23_438
    for row in speed["by_batch"]:
        if row["run"] in events:
            assert (f"| {row['milliseconds_an_update']:.2f} | {row['images_a_second']:,} | "
                    f"{100 * row['model_flop_utilisation']:.1f} % |") in pages[2]
    for made in (speed, *provenance.read(folder)):
        assert made["command"].startswith("python -m bigbatch.main ")
        assert re.match(r"[0-9a-f]{40}$", made["revision"])
