"""Published records exist where pages name them, and are drawn again from their logs."""

import json
import re
import statistics

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
    selection,
    tables,
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
COSINE = RECORDS / "2026-11-27_cosine"
LANGUAGE = RECORDS / "2026-11-26_language"
SPEED = RECORDS / "2026-11-26_speed.json"
NOISE = {scale: RECORDS / f"2026-11-26_noise_{scale}" for scale in ("digits", "small", "bytes")}
NOISE_COST = RECORDS / "2026-11-26_noise_cost.json"


def text_of(page):
    """A page, with one space where a line ends."""
    return " ".join((REPOSITORY / page).read_text(encoding="utf-8").split())


def rows_on(page):
    return rows_of((REPOSITORY / page).read_text(encoding="utf-8"))


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
    assert [row for row in rows_of(drawn) if row not in rows_on("docs/branches.md")] == []
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
    reproduce.draw(selection.select("all", "small"), "small", 3, SMALL, tmp_path)
    kept, drawn = ((folder / "tables.md").read_text(encoding="utf-8")
                   for folder in (SMALL, tmp_path))
    assert kept == drawn and len(rows_of(drawn)) > 60
    # Only of appendix B's rates no number of the paper's is known.
    assert drawn.count("not given") == len(figures.RATES)
    made = [[*row[:3], row[3].partition(" (")[0], *row[4:]] for row in rows_of(drawn)]
    shown = [row for row in rows_on("docs/reproduce.md")
             if len(row) == 8 and row[6] == "3" and row[4] != ""]
    assert len(shown) == 15 and [row for row in shown if row not in made] == []


def test_the_tables_beyond_the_paper_are_drawn_again_and_are_those_of_the_page(tmp_path):
    reproduce.draw(selection.select("cosine,exchange", "small"), "small", 3, COSINE, tmp_path)
    drawn = (tmp_path / "tables.md").read_text(encoding="utf-8")
    assert drawn == (COSINE / "tables.md").read_text(encoding="utf-8")
    found = {row[0]: row for row in rows_of(drawn) if len(row) > 8}
    shown = [row for row in rows_on("docs/reproduce.md") if row[0] in ("cosine", "exchange")]
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
    for page in ("README.md", "docs/reproduce.md"):
        assert [row for row in rows_of(drawn) if row not in rows_on(page)] == []


def test_the_page_on_speed_has_the_table_of_its_record():
    record = json.loads(SPEED.read_text(encoding="utf-8"))
    assert re.match(r"[0-9a-f]{40}$", record["revision"]), "measured with uncommitted code"
    # Records of version 0.1 call a measurement a figure.
    found = [measure.Measurement(*(row[name] for name in measure.Measurement._fields))
             for row in record["figures"]]
    page = rows_on("docs/speed.md")
    made = rows_of(measure.markdown(found, record["hardware"]))
    assert len(made) > 20 and [row for row in made if row not in page] == []
    record = json.loads((RECORDS / "2026-11-26_language_speed.json").read_text(encoding="utf-8"))
    found = [measure.Measurement(*(row[name] for name in measure.Measurement._fields))
             for row in record["measurements"]]
    made = rows_of(measure.markdown(found, record["hardware"]))
    assert len(made) == 4 and [row for row in made if row not in page] == []


def test_the_language_models_table_is_drawn_again_and_is_that_of_the_page(tmp_path):
    chosen = selection.select("language", "bytes")
    reproduce.draw(chosen, "bytes", 5, LANGUAGE, tmp_path)
    drawn = (tmp_path / "tables.md").read_text(encoding="utf-8")
    assert drawn == (LANGUAGE / "tables.md").read_text(encoding="utf-8")
    page = rows_on("docs/reproduce.md")
    found = [row for row in rows_of(drawn) if row[-2] in ("the reference", "same", "higher")]
    assert len(found) == 5
    for row in found:
        shown = [row[0], row[2].partition(" (")[0], row[5], row[1], row[7],
                 "" if row[8] == "the reference" else row[8]]
        assert shown in page, shown
    with records.opened(LANGUAGE) as folder:
        results = reproduce.read(chosen, "bytes", 5, folder, folder)
    left = tables.rows(chosen[0].panels[0], "bytes", results)[-1].comparison
    assert (f"{left.difference:+.4f} ({left.low:+.4f} to {left.high:+.4f})"
            in text_of("docs/reproduce.md"))


@pytest.mark.parametrize("scale", NOISE)
def test_the_measured_noise_is_drawn_again_and_is_that_of_the_page(scale, tmp_path):
    name, seeds = {"digits": ("noise", 2), "small": ("noise", 3), "bytes": ("noise_language", 1)}[
        scale]
    chosen = selection.select(name, scale)
    reproduce.draw(chosen, scale, seeds, NOISE[scale], tmp_path)
    drawn = (tmp_path / "tables.md").read_text(encoding="utf-8")
    assert drawn == (NOISE[scale] / "tables.md").read_text(encoding="utf-8")
    page = rows_on("docs/noise.md")
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
    page = rows_on("docs/noise.md")
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
    page = rows_on("docs/sharding.md")
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
        if record in (SMALL, COSINE, NOISE["small"], DECIDING["cifar10"]):
            assert "JPEGs of quality 75" in training["data"]


def test_the_h200s_results_are_the_records(tmp_path):
    folder = RECORDS / "2026-11-26_h200"
    chosen = selection.only(selection.select("3a", "paper"), ["decay", "increase"])
    reproduce.draw(list(map(selection.beside_updates, chosen)), "paper", 1, folder, tmp_path)
    with Image.open(folder / "figure_3.png") as kept, Image.open(
            tmp_path / "figure_3.png") as drawn:
        assert kept.size == drawn.size
    speed = json.loads(folder.with_name("2026-11-26_h200_speed.json").read_text(encoding="utf-8"))
    events, ended = {}, {}
    with records.opened(folder) as unpacked:
        for preset, *papers in (("decay", "decaying learning rate", "94.3 % (its Figure 5)"),
                                ("increase", "increasing batch size", "~94.3 %")):
            run = logs.read_run(unpacked / "runs" / f"{preset}_dtype=bfloat16_seed=0")
            events[preset] = run.events
            seconds = sum(event["wall_seconds"] for event in run.timing
                          if event["event"] == "time_share")
            ended[preset] = 100 * run.events[-1]["test_accuracy"]
            updates = f"{run.updates:,}"  # the paper's too: it is its recipe
            row = ["3a", papers[0], updates, papers[1], updates, f"{ended[preset]:.2f} %", "1",
                   f"{seconds:.0f}"]
            assert row in rows_on("README.md") and row in rows_on("docs/reproduce.md")
            late = [event for event in run.events if event["epoch"] >= 184.5
                    and "test_accuracy" in event]
            mean = 100 * statistics.mean(event["test_accuracy"] for event in late)
            assert len(late) == 21 and f"{mean:.2f} %" in text_of("docs/reproduce.md")
            assert f"{run.events[-1]['test_loss']:.3f}" in text_of("docs/reproduce.md")
    below = f"{ended['decay'] - ended['increase']:.2f} points"
    assert all(below in text_of(page) for page in ("README.md", "docs/reproduce.md"))
    shared = [a for a, b in zip(events["decay"], events["increase"], strict=False) if a == b]
    assert len(shared) == 600 and shared[-1]["updates"] == 23_438
    made = [[
        f"{row['batch']:,}", f"{row['passes']} of 640" if row["passes"] > 1 else "1",
        f"`{row['run']}`", f"{row['updates']:,}", f"{row['milliseconds_an_update']:.2f}",
        f"{row['images_a_second']:,}", f"{100 * row['model_flop_utilisation']:.1f} %",
    ] for row in speed["by_batch"] if row["run"] in events]
    names = iter(["`increase`", "`decay`, first process", "`decay`, second process"])
    starts = iter(["nothing cached", "all cached"])
    for row in speed["starts"]:
        if row["run"] in events:
            made.append([next(names), f"{row['loop_seconds']:.1f}", *(
                f"{100 * share:.1f} %" for share in row["time_share"].values())])
        else:
            digits = 1 if row["run"].endswith("cold") else 2
            *programs, _ = speed["compile_seconds"][row["run"]].values()
            made.append([next(starts), *(f"{seconds:.{digits}f} s" for seconds in programs),
                         f"{row['seconds_from_the_loops_clock_to_the_first_program']:.1f} s",
                         f"{row['start_to_first_update_seconds_at_most']:.0f} s"])
    assert len(made) == 10 and [row for row in made if row not in rows_on("docs/speed.md")] == []
    for made in (speed, *provenance.read(folder)):
        assert made["command"].startswith("python -m bigbatch.main ")
        assert re.match(r"[0-9a-f]{40}$", made["revision"])


def test_the_throughput_of_photographs_is_the_records():
    record = json.loads((RECORDS / "input_throughput.json").read_text(encoding="utf-8"))

    def spread(values, digits):
        middle, low, high = (f"{number:.{digits}f}" for number in (
            statistics.median(values), min(values), max(values)))
        return f"{middle} ({low}-{high})" if low != high else "1"

    for row, name in (
            ("bigbatch, stream", "bigbatch's stream, bicubic: order, crops, microbatches"),
            ("TensorFlow, bicubic", "TensorFlow as in Flax's ImageNet example, bicubic"),
            ("TensorFlow, bilinear", "TensorFlow, bilinear"),
            ("bigbatch, bicubic", "bigbatch, decode and resize alone, bicubic"),
            ("bigbatch, bilinear", "bigbatch, decode and resize alone, bilinear")):
        assert [name, spread(record["images_per_second"][row], 0),
                spread(record["against TensorFlow, bicubic"][row], 2)] in rows_on("docs/data.md")


def test_starts_with_programs_from_a_bucket_are_the_records():
    record = json.loads((RECORDS / "2026-11-26_new_machine.json").read_text(encoding="utf-8"))
    assert len(record["measurements"]) == 3
    for row in record["measurements"]:
        spans = [" to ".join(dict.fromkeys(f"{end(seconds):.0f}" for end in (min, max))) + " s"
                 for seconds in row["seconds"].values()]
        values = row["values"]
        ratio = f"{statistics.median(values):.2f}" + (
            f" ({min(values):.2f} to {max(values):.2f})" * (len(values) > 1))
        assert [row["setting"], *spans, ratio, str(len(values))] in rows_on("docs/pods.md")


def test_measurements_that_stand_in_sentences_are_the_records():
    def read(name):
        record = json.loads((RECORDS / f"{name}.json").read_text(encoding="utf-8"))
        assert re.match(r"[0-9a-f]{40}$", record["revision"]), "measured with uncommitted code"
        return record

    def ends(values, form):
        return " to ".join(format(end, form) for end in (min(values), max(values)))

    together = read("2026-11-25_seeds_together")["seconds"]
    times = [a / b for a, b in zip(*together.values(), strict=True)]
    assert (f"seeds take {statistics.median(times):.1f} times as long ({ends(times, '.1f')} in "
            f"{len(times)} repeats of 3 seeds") in text_of("docs/reproduce.md")
    page = text_of("docs/speed.md")
    torch = read("2026-11-27_speed_pytorch")["measurements"][0]["values"]
    assert (f"({statistics.median(torch):.2f} on 2026-11-27, {ends(torch, '.2f')}, "
            f"n = {len(torch)}") in page
    newer = {(row["name"], row["setting"]): row["values"]
             for row in read("2026-11-26_speed_jax_0.12")["figures"]}
    for key, form, after in (
            (("small networks: share of Python between updates",
              "configs/digits.py, 900 updates of 16"), ".3f", "there "),
            (("whole start to the first update, warm cache beside cold", "ResNet-50"), ".2f",
             "of a cold one ")):
        assert (f"{statistics.median(newer[key]):{form}} {after}({ends(newer[key], form)}, "
                f"n = {len(newer[key])})") in page
    (compiling,) = read("2026-11-27_compile_time")["rows"]
    ours, flax = ("{:.0f} and {:.0f} s".format(*seconds)
                  for seconds in compiling["seconds"].values())
    assert ("takes {:.2f} and {:.2f} times the processor time of Flax's step".format(
        *compiling["values"]) + f" ({ours} for {flax}, in turns;") in page
