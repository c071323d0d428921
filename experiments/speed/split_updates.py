"""An update whose state is split over devices, beside one whose state is whole on each of them.

    XLA_FLAGS=--xla_force_host_platform_device_count=4 python -m experiments.speed.split_updates

A small language model, the three ways in turns in one process: the seconds on the clock, and then
the process's own. The devices of a CPU share its cores and its memory, so this says what the split
costs in work, and nothing of a network between devices. Writes the record and prints the table.
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax

from experiments import provenance
from experiments.figures import REPOSITORY, load_config
from experiments.markdown_table import markdown_table
from experiments.speed.bare import BareUpdate
from experiments.speed.language import SETTINGS
from experiments.speed.measure import Measurement, check_same_loss, paired, ratios, spread

RECORD = REPOSITORY / "experiments/records/split_updates.json"
MODEL = "model.width=128,model.hidden=352"  # of `bytes`, twice as wide: most arrays are cut
SPLITS = {"whole": "", "optimizer": ",sharding.optimizer=true",
          "parameters": ",sharding.parameters=true"}
CLOCKS = {"wall time": time.perf_counter, "processor time": time.process_time}


def split_updates(repeats: int, short: bool) -> list[Measurement]:
    """The seconds of each split's updates over those of the whole state's, by both clocks.

    Raises:
        RuntimeError: if they do not train the same.
    """
    size = "data.options.length=16,recipe.batch_size=32" if short else "recipe.batch_size=64"
    config = (f"configs/language.py:bytes,strategy=decay,{SETTINGS},data.train_examples=512,"
              f"data.test_examples=1,data.train_split=train,data.test_split=test,"
              f"recipe.epochs=64 examples,{MODEL},{size}")
    devices = len(jax.devices())
    rows = {name: BareUpdate(load_config(config + keys), devices=devices)
            for name, keys in SPLITS.items()}
    for row in rows.values():
        row.take(2)  # the loss of the second follows from the first update
        check_same_loss(row.loss, rows["whole"].loss, 1e-4)
    found, times = [], 1 if short else 4
    for clock, read in CLOCKS.items():
        seconds = paired({name: partial(row.take, times) for name, row in rows.items()}, repeats,
                         read)
        found += [
            Measurement(name, clock, "", "x", ratios(seconds[name], seconds["whole"]),
                        seconds={name: seconds[name], "whole": seconds["whole"]})
            for name in SPLITS if name != "whole"]
    return found


def table(measurements: Sequence[Mapping[str, Any]]) -> str:
    """A line of Markdown for each split: its seconds over the whole state's."""
    found = {(row["name"], row["setting"]): Measurement(**row) for row in measurements}
    return markdown_table(
        ["split", *CLOCKS],
        [[name, *(spread(found[name, clock]) for clock in CLOCKS)]
         for name in SPLITS if name != "whole"])


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    made = provenance.describe(provenance.command_line("experiments.speed.split_updates"))
    rows = [row._asdict() for row in split_updates(options.repeats, short=False)]
    RECORD.write_text(json.dumps(made | {"devices": len(jax.devices()), "measurements": rows},
                                 indent=1) + "\n", encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
