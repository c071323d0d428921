"""The table of updates by the compilers of absent accelerators: its record, and what has grown."""

import json
import re

import pytest

from bigbatch.job import chips
from experiments import slices
from experiments.growth import grown
from experiments.speed import by_compiler, split_states
from tests.conftest import REPOSITORY
from tests.support.tables import rows_of


def row(seconds=1.0, memory=100, work=by_compiler.WHOLE, compiler="one", fits=True, images=32):
    return {"network": "ResNet-50", "slice": "v2-8", "images": images, "work": work,
            "compiler": compiler, "fits": fits, "seconds": seconds, "temporary_bytes": memory}


@pytest.mark.parametrize(("after", "said"), [
    (row(1.03, 103), []),
    (row(1.04), ["ResNet-50 v2-8 32 whole, seconds (one) was 1 and is 1.04"]),
    (row(0.5, 104), ["ResNet-50 v2-8 32 whole, temporary_bytes (one) was 100 and is 104"]),
    (row(9.0, compiler="another"), []),
    (row(9.0, work=by_compiler.FED), []),
    (row(9.0, images=128), []),
])
def test_what_has_grown_by_more_than_3_percent_is_named(after, said):
    before = by_compiler.numbers([row(), row(work=by_compiler.FED)])
    assert grown(before, by_compiler.numbers([after])) == said


def test_what_does_not_fit_any_more_has_grown_and_what_never_fitted_has_not():
    fits, not_any_more = ([row(fits=fits)] for fits in (True, False))
    told = grown(*map(by_compiler.numbers, (fits, not_any_more)))
    assert len(told) == 2 and all(line.endswith("cannot be had any more") for line in told)
    assert grown(*map(by_compiler.numbers, (not_any_more, fits))) == []


def test_the_record_of_slices_is_compared_with_itself():
    plans = json.loads((REPOSITORY / "experiments/records/slices.json").read_text())["plans"]
    before = slices.seconds(plans)
    assert len(before) > 50 and grown(before, before) == []
    slower = {name: 1.04 * number for name, number in before.items()}
    assert len(grown(before, slower)) == len(before)


def test_the_record_is_what_the_docs_say():
    record = json.loads(by_compiler.RECORD.read_text())
    shown = rows_of((REPOSITORY / "docs/speed.md").read_text())
    table = rows_of(by_compiler.table(record["rows"]))
    assert len(table) > 1 and [cells for cells in table if cells not in shown] == []


def test_no_update_takes_longer_than_the_plain_step_beside_it():
    rows = json.loads(by_compiler.RECORD.read_text())["rows"]
    seconds = {by_compiler.Case(*(row[field] for field in by_compiler.Case._fields)):
               row["seconds"] for row in rows}
    over = {case[:3]: seconds[case._replace(work=by_compiler.WHOLE)] / plain
            for case, plain in seconds.items() if case.work == by_compiler.FLAX}
    assert len(over) == 5 and max(over.values()) <= 1


def test_what_determinism_costs_is_what_the_page_says():
    rows = {(row["network"], row["work"]): row["accessed_bytes"]
            for row in json.loads(by_compiler.RECORD.read_text())["rows"]
            if row["slice"] == "h100-1" and row["images"] in (32, 128)
            and (row["network"], row["images"]) != ("ResNet-50", 128)}
    page = " ".join((REPOSITORY / "docs/promises.md").read_text().split())
    more = {name: rows[name, by_compiler.DETERMINISTIC] / rows[name, by_compiler.WHOLE]
            for name in ("WRN-16-4", "ResNet-50", "Inception-ResNet-V2")}
    assert more["WRN-16-4"] == 1 and f"{more['ResNet-50']:.3f} times as much (32 images)" in page
    assert f"Inception-ResNet-V2 {more['Inception-ResNet-V2']:.3f} times" in page


def test_what_the_page_on_language_says_of_an_update_of_gpt_2_is_in_the_records():
    """With XLA's attention beside a plain step, and a pass of as many sequences without it."""
    rows = json.loads(by_compiler.RECORD.read_text())["rows"]
    ours, plain = (next(row for row in rows if row["network"] == "GPT-2 small"
                        and row["work"] == work) for work in (by_compiler.WHOLE, by_compiler.FLAX))
    plans = json.loads((REPOSITORY / "experiments/records/slices_language.json").read_text())
    row, phase = (plans["plans"][0][key] for key in ("compiled", "phases"))
    row, passes = row["phases"][0], phase[0]["microbatches"]
    memory, limit = (number / chips.GIB for number in (
        ours["argument_bytes"] + ours["extra_bytes"], row["memory_limit_bytes"]))
    page = " ".join((REPOSITORY / "docs/language.md").read_text().split())
    for said in (
            f"with 16 sequences then takes {1000 * ours['seconds']:.0f} ms on a v5e chip",
            f"{ours['seconds'] / plain['seconds']:.3f} of the time of a plain step",
            f"needs {memory:.1f} of {limit:.1f} GiB with them",
            f"need {row['memory_bytes'] / chips.GIB:.1f} GiB, with the gradients",
            f"takes {1000 * row['seconds'] / passes:.0f} ms ({row['seconds']:.3f} s for {passes})"):
        assert said in page, said


def test_the_record_of_split_states_is_what_the_docs_say():
    """And no split update of GPT-2 small is estimated to take more time or memory."""
    rows = json.loads(split_states.RECORD.read_text())["rows"]
    assert all({"command", "began", "revision"} <= row["made"].keys() for row in rows)
    shown = rows_of((REPOSITORY / "docs/sharding.md").read_text())
    table = rows_of(split_states.table(rows))
    assert len(table) > 5 and [cells for cells in table if cells not in shown] == []
    assert all(row["fits"] for row in rows)
    small = {row["split"]: row for row in rows if row["model"] == "gpt_124m"}
    for split in ("optimizer", "parameters"):
        for key in ("seconds", "memory_bytes"):
            assert small[split][key] <= small["whole"][key]


def test_a_row_that_is_planned_again_says_so_and_the_others_stay(tmp_path, monkeypatch, capsys):
    record = tmp_path / "split_states.json"
    before = json.loads(split_states.RECORD.read_text())["rows"]
    record.write_text(json.dumps({"rows": before}))
    planned = {split_states._case(row): {key: row[key] for key in row if key != "made"}
               for row in before}
    monkeypatch.setattr(split_states, "RECORD", record)
    monkeypatch.setattr(split_states, "measure", lambda case, folder: planned[case])
    monkeypatch.setattr(split_states.topology, "compile_elsewhere", lambda: None)
    monkeypatch.setattr("sys.argv", ["split_states", "--only=gpt_124m,whole"])
    split_states.main()
    (first, *after) = json.loads(record.read_text())["rows"]
    assert after == before[1:]
    assert first["made"]["command"] == (
        "python -m experiments.speed.split_states --only=gpt_124m,whole")
    assert re.match("[0-9a-f]{40}|unknown", first["made"]["revision"])
    monkeypatch.setattr("sys.argv", ["split_states", "--only=gpt_125m"])
    with pytest.raises(SystemExit):
        split_states.main()
    assert "--only=gpt_125m: no row has all of these words" in capsys.readouterr().err


def test_plans_for_slices_say_how_they_were_made(tmp_path, monkeypatch):
    kept = json.loads((REPOSITORY / "experiments/records/slices_language.json").read_text())
    planned, output = iter(kept["plans"]), tmp_path / "slices.json"
    monkeypatch.setattr(slices, "plan_for_slices", lambda config, name: next(planned))
    monkeypatch.setattr(slices.topology, "compile_elsewhere", lambda: None)
    monkeypatch.setattr("sys.argv", ["slices", "--family=language", f"--output={output}"])
    slices.main()
    made = json.loads(output.read_text())
    assert made["plans"] == kept["plans"]
    assert made["command"] == (
        f"python -m experiments.slices --family=language --output={output}")
    assert made["revision"] and made["hardware"] and made["versions"]["jax"]
