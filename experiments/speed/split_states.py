"""What splitting a state over devices costs and saves on TPU slices that are not here.

    python -m experiments.speed.split_states [--only=TEXT,...]

Plans one update of language models (`bigbatch.plan`) with a whole state, with the optimizer's state
split, and with all of it split. Writes the record and prints the table of docs/sharding.md. --only
takes the rows whose text has all of these words, and leaves the others of the record, so each row
says how it was made. Programs that were compiled before are not compiled again; on 2 cores each of
the others takes minutes.

The times are estimates: cycles of all instructions, without the exchange between devices.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bigbatch.config import make_phases
from bigbatch.job.chips import GIB
from bigbatch.mistake import Mistake
from bigbatch.planning import slices, topology
from bigbatch.storage import caches
from experiments import provenance
from experiments.command_line import one_line_errors
from experiments.figures import REPOSITORY, load_config
from experiments.markdown_table import markdown_table

RECORD = REPOSITORY / "experiments/records/split_states.json"
SPLITS = ("whole", "optimizer", "parameters")
# Of which a device takes two sequences at once, and 16 devices share a state.
SEVEN_BILLION = ("model.blocks=32,model.width=4096,model.heads=32,model.hidden=11008,"
                 "ghost_size=2,max_per_device_batch=2,eval_batch_size=2,sharding.shards=16")


class Case(NamedTuple):
    """One update to plan."""

    model: str
    settings: str  # of configs/language.py
    slice: str
    split: str  # one of SPLITS
    batch: int  # sequences of an update


CASES = [
    *(Case("gpt_124m", "gpt_124m", "v5litepod-8", split, 64) for split in SPLITS),
    *(Case("llama_1b", "llama_1b", slice_name, "parameters", 1024)
      for slice_name in ("v5litepod-16", "v5litepod-64")),
    Case("7 billion", f"llama_1b,{SEVEN_BILLION}", "v5litepod-256", "parameters", 512),
]


def measure(case: Case, folder: Path) -> dict[str, Any]:
    """The case's row of the record: its fields, and what a plan says of its update and state."""
    split = "" if case.split == "whole" else f"sharding.{case.split}=true,"
    config = load_config(
        f"configs/language.py:{case.settings},{split}strategy=decay,recipe.warmup_epochs=0.0,"
        f"recipe.batch_size={case.batch},limits.max_batch_size={case.batch}")
    phases = make_phases(config)
    told = slices.compile_for(
        config, phases, slices.parse(case.slice, phases), folder, lambda text: print(text))
    update, evaluation = told["phases"][0], told["evaluations"][0]
    return case._asdict() | {
        "compiler": told["compiler"], "state_bytes": told["states"][case.slice],
        **{key: update[key] for key in (
            "fits", "memory_bytes", "memory_limit_bytes", "seconds", "flops", "collectives",
            "programs")},
        "evaluation_bytes": evaluation["memory_bytes"],
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line of Markdown for each case."""
    whole = {(row["model"], row["slice"]): row["seconds"]
             for row in rows if row["split"] == "whole"}
    lines = []
    for row in rows:
        key = "" if row["split"] == "whole" else row["split"]
        before = whole.get((row["model"], row["slice"]))
        lines.append([
            row["model"], row["slice"], row["split"],
            *(f"{row['state_bytes'][name] / GIB:.3g}" for name in ("", key)),
            f"{row['memory_bytes'] / GIB:.3g} of {row['memory_limit_bytes'] / GIB:.3g}",
            f"{1000 * row['seconds']:.4g}" if row["fits"] else "does not fit",
            f"{row['seconds'] / before:.3f}" if before else "",
            ", ".join(f"{kind} {count} of {size / 1e6:.0f}"
                      for kind, (count, size) in sorted(row["collectives"].items())),
        ])
    return markdown_table(
        ["model", "slice", "split", "whole state, GiB", "a device's, GiB", "an update's, GiB",
         "ms", "over whole's", "collectives of an update, MB"], lines)


def main() -> None:
    """Plans the cases that the command line names, writes the record and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="words that a row must have, with commas")
    options = parser.parse_args()
    with one_line_errors("experiments.speed.split_states"):
        topology.compile_elsewhere()
        words = [word for word in options.only.split(",") if word]
        chosen = [case for case in CASES if set(words) <= set(map(str, case))]
        if not chosen:
            raise Mistake(f"--only={options.only}: no row has all of these words.")
        rows = json.loads(RECORD.read_text())["rows"] if RECORD.exists() else []
        known = {_case(row): row for row in rows}
        made = provenance.describe(provenance.command_line("experiments.speed.split_states"))
        for case in chosen:
            print(*case, flush=True)
            known[case] = measure(case, Path(caches.folder("plans")).expanduser()) | {"made": made}
        rows = [known[case] for case in CASES if case in known]
        RECORD.write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")
        print(table(rows))


def _case(row: Mapping[str, Any]) -> Case:
    return Case(*(row[field] for field in Case._fields))


if __name__ == "__main__":
    main()
