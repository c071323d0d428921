"""Does every large preset fit on slices of Cloud TPU? The TPU compiler answers, without a TPU.

    make slices

Plans each preset for each slice (`bigbatch.plan`), writes the plans into --output, and prints the
table of launch/README.md, or with --family=language that of docs/language.md. Where an update has
become slower than --output says by more than 3 %, it says so, ends with status 1 and leaves the
file as it was. Programs that were compiled before are not compiled again.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bigbatch.job import chips
from bigbatch.plan import plan_for_slices
from bigbatch.planning import topology
from configs import imagenet_inception_resnet_v2, imagenet_resnet50
from experiments import provenance
from experiments.command_line import one_line_errors
from experiments.figures import load_config
from experiments.growth import grown
from experiments.markdown_table import markdown_table

PRESETS = [
    f"{family}:{preset}"
    for family, module in (("imagenet_resnet50", imagenet_resnet50),
                           ("imagenet_inception_resnet_v2", imagenet_inception_resnet_v2))
    for preset in module.PRESETS
]
# Half and all of the paper's pod, and a small slice of later generations.
SLICES = ("v2-256", "v2-512", "v3-32", "v5litepod-32", "v6e-32")
# Of a model that does not fit: the slice it does not fit on, and devices that have the memory.
LANGUAGE = {"language:gpt_124m": ("v5litepod-8", "v5litepod-64"),
            "language:llama_1b": ("v5litepod-8", "v5litepod-64", "v4-16")}
# The paper's own run of this preset changes to the second slice at the first fall.
ON_TWO = {"imagenet_resnet50:thirty_minutes": "v2-256,noise/10=v2-512"}


def table(plans: Sequence[dict[str, Any]]) -> str:
    """A line of Markdown for each plan, with the least and the most over its phases."""
    def span(values: Sequence[float], form: str) -> str:
        texts = [format(value, form) for value in (min(values), max(values))]
        return texts[0] if texts[0] == texts[1] else " to ".join(texts)

    lines = []
    for planned in plans:
        rows, compiled = planned["compiled"]["phases"], planned["compiled"]
        memory = [f"{max(row['memory_bytes'] for row in rows) / chips.GIB:.1f}"]
        if None in (row["seconds"] for row in rows):  # the compiler refused it
            lines.append([
                planned["config"].partition(":")[2], planned["topology"],
                span([phase["microbatches"] for phase in planned["phases"]], "d"),
                f"{memory[0]}: does not fit",
                span([row["memory_limit_bytes"] / chips.GIB for row in rows], ".1f"), *[""] * 5])
            continue
        sums = [row["collectives"]["all-reduce"] for row in rows]
        lines.append([
            planned["config"].partition(":")[2], planned["topology"],
            span([phase["microbatches"] for phase in planned["phases"]], "d"),
            span([row["memory_bytes"] / chips.GIB for row in rows], ".1f")
            if compiled["fits"] else "does not fit",
            span([row["memory_limit_bytes"] / chips.GIB for row in rows], ".1f"),
            span([count for count, _ in sums], "d"), span([size / 1e6 for _, size in sums], ".0f"),
            span([row["seconds"] for row in rows], ".3g"),
            f"{compiled['seconds_at_least'] / 3600:.2g}", f"{compiled['chip_hours_at_least']:.0f}",
        ])
    return markdown_table(
        ["preset", "slice", "passes", "memory, GiB", "of", "all-reduces", "MB reduced", "update, s",
         "run, hours", "chip-hours"], lines)


def seconds(plans: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """The estimates of all updates, by names; the compiler is one of them."""
    return {
        f"{planned['config']} on {planned['topology']}, phase {index}, seconds "
        f"({planned['compiled']['compiler']})": row["seconds"] if row["fits"] else None
        for planned in plans for index, row in enumerate(planned["compiled"]["phases"])
    }


def main() -> None:
    """Plans everything and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", required=True, help="file for the record, JSON")
    parser.add_argument("--family", choices=("imagenet", "language"), default="imagenet")
    parser.add_argument("--accept", action="store_true", help="write the record whatever has grown")
    options = parser.parse_args()
    output = options.output
    with one_line_errors("experiments.slices"):
        Path(output).open("a").close()  # else a file that cannot be written is an error hours later
        before = json.loads(Path(output).read_text() or '{"plans": []}')["plans"]
        topology.compile_elsewhere()
        record = provenance.describe(provenance.command_line("experiments.slices"))
        plans, on = [], LANGUAGE if options.family == "language" else {
            preset: [ON_TWO[preset]] * (preset in ON_TWO) + list(SLICES) for preset in PRESETS}
        for preset, names in on.items():
            family, _, argument = preset.partition(":")
            for name in names:
                config = load_config(f"configs/{family}.py:{argument}")
                plans.append({"config": preset, "topology": name,
                              **plan_for_slices(config, name)})
        if (lines := grown(seconds(before), seconds(plans))) and not options.accept:
            raise RuntimeError(f"{'; '.join(lines)} ({output} stays; --accept renews it)")
        text = json.dumps(record | {"plans": plans}, indent=1) + "\n"
        Path(output).write_text(text, encoding="utf-8")
        print(table(plans))


if __name__ == "__main__":
    main()
