"""Does a run that decides when its batch grows end better than the best schedule made beforehand?

    python -m experiments.deciding --setting=digits --output=runs/deciding

One of SETTINGS, with the strategy `measured` and several seeds. Each of its runs is set beside
schedules that are fixed in advance and take as many updates, as exactly as whole batches allow: one
batch from the second update on; one that grows once to the largest, or twice, at the place at which
the number of updates comes out the same; and what another seed has decided. Which of these is best
is chosen with hindsight, so that what is compared with is better than what one could have known.
Beside them are `decay` and `increase` with the numbers of updates that they have. The same command
again continues what is there.
"""

import argparse
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from bigbatch.branching.verdicts import compare
from experiments import logs, records, runs
from experiments.command_line import data_settings, one_line_errors
from experiments.figures import REPOSITORY
from experiments.logs import Logs
from experiments.markdown_table import markdown_table


class Setting(NamedTuple):
    """What is trained, and what counts as the same. Both were stated before any of its runs."""

    config: str  # but for the strategy
    decides: str  # how the run that decides averages, and when it looks
    margin: float  # nats of test loss that are called the same


RULE = "strategy=measured,measured.rule=noise,measured.threshold=1"
# Averages over an epoch, a twelfth of a run or so.
EPOCHS = "noise.window_epochs=1,measured.every_epochs=0.25,measured.stay_epochs=1"
SETTINGS = {
    # 12 epochs with falls where the demonstration has them, and four ghost batches in the first
    # batch.
    "digits": Setting(
        "configs/digits.py:decay,recipe.batch_size=32,ghost_size=8,recipe.epochs=12,"
        "recipe.falls=((3.6,3),(7.2,3),(9.6,3)),tensorboard=false,checkpoint_every_epochs=100",
        EPOCHS, 0.01),
    # Half of the scale `small`'s epochs with its falls, and four of its ghost batches in the first
    # batch, with its noise: four times its batch and its rate. The largest batch is N/10.
    "cifar10": Setting(
        "configs/small.py:decay,recipe.batch_size=64,recipe.learning_rate=0.4,recipe.epochs=10.24,"
        "recipe.falls=((3,5),(6,5),(8,5)),limits.max_batch_size=512,checkpoint_every_epochs=100",
        EPOCHS, 0.03),
    # A quarter of the preset's tokens, with its cosine and a warm-up of an eighth. Batches need not
    # be multiples of 8, as no layer normalises examples together, so numbers of updates come out
    # more exactly.
    "bytes": Setting(
        "configs/language.py:bytes,recipe.epochs=8192 examples,recipe.warmup_epochs=1024 examples,"
        "ghost_size=1,checkpoint_every_epochs=100",
        "noise.window_epochs=512 examples,measured.every_epochs=256 examples,"
        "measured.stay_epochs=512 examples", 0.01),
}
# The schedules, by what the folders of their runs are called.
SCHEDULES = {
    "measured": "measured", "decay": "decay", "increase": "increase", "onebatch": "one batch",
    "growsonce": "grows once", "growstwice": "grows twice",
    "anotherseedsdecisions": "another seed's decisions",
}
OTHERWISE = ("measured", "decay", "increase")  # not made for the updates of a run that decides


def fixed(run: Logs, other: Logs) -> dict[str, str]:
    """The settings of schedules with as many updates as `run`, by their keys in SCHEDULES.

    All take their first update with the recipe's batch, so that rates and what an optimizer keeps
    per example refer to it.

    Args:
        run: one that has decided.
        other: one of another seed.
    """
    first, examples = run.phases[0]["batch_size"], run.phases[-1]["nominal_end_example"]
    largest, ghost = run.config["limits"]["max_batch_size"], run.config["ghost_size"]
    middle = round(math.sqrt(first * largest) / first) * first
    constant = round((examples - first) / (run.updates - 1) / ghost) * ghost
    # start/first + (examples - start)/largest = updates; and with `start` more in `middle`
    left = run.updates - examples / largest
    once = left / (1 / first - 1 / largest)
    twice = left / (1 / first + 1 / middle - 2 / largest)
    once, twice = (round(start / middle) * middle for start in (once, twice))
    growths = [(event["examples_seen"], event["grows_to"])
               for event in other.events if "grows_to" in event]
    return {
        "onebatch": by_hand([(first, constant)]),
        "growsonce": by_hand([(once, largest)]),
        "growstwice": by_hand([(twice, middle), (2 * twice, largest)]),
        "anotherseedsdecisions": by_hand(growths),
    }


def by_hand(pairs: Sequence[tuple[int, int]]) -> str:
    """The settings of a run with batches by hand, (example, batch from there on)."""
    listed = ",".join(f"('{example} examples',{batch})" for example, batch in pairs)
    return f"strategy=by_hand,by_hand=({listed},)"


def train(
    name: str, config: str, settings: Sequence[str], output: Path, data: Sequence[str]
) -> None:
    """Trains a schedule with its settings for each seed, where that is not done."""
    runs.train_missing(
        [runs.Run(f"{config},{text},seed={seed}", output / "runs" / f"{name}-{seed}")
         for seed, text in enumerate(settings)],
        output, "experiments.deciding", data)


def read(folder: Path, names: Iterable[str] = SCHEDULES) -> dict[str, list[Logs]]:
    """The runs of each schedule of `names`, from a workdir or a record; of those that are there."""
    with records.opened(folder) as opened:
        found = {name: sorted((opened / "runs").glob(f"{name}-*")) for name in names}
        return {name: list(map(logs.read_run, paths)) for name, paths in found.items() if paths}


def final(found: Sequence[Logs], quantity: str) -> list[float]:
    """The last value of each run."""
    return [run.events[-1][quantity] for run in found]


def table(results: dict[str, list[Logs]], margin: float) -> str:
    """Each schedule's updates and ends, and how the deciding runs compare with it."""
    shares = ["test_accuracy"] * ("test_accuracy" in results["measured"][0].events[-1])
    rows, losses = [], {name: final(found, "test_loss") for name, found in results.items()}
    best = min((name for name in losses if name not in OTHERWISE),
               key=lambda name: statistics.mean(losses[name]))
    for name, found in results.items():
        told = ""
        if name != "measured":
            against = compare(losses["measured"], losses[name], margin)
            told = (f"{against.difference:+.4f} ({against.low:+.4f} to {against.high:+.4f}), "
                    f"{against.verdict}")
        updates = [run.updates for run in found]
        rows.append([
            SCHEDULES[name] + ", the best of these" * (name == best), str(len(found)),
            f"{statistics.mean(updates):.0f} ({min(updates)} to {max(updates)})",
            f"{statistics.mean(losses[name]):.4f}",
            *(f"{statistics.mean(final(found, quantity)):.2%}" for quantity in shares), told])
    return markdown_table(
        ["schedule", "seeds", "updates", "test loss", *(name.replace("_", " ") for name in shares),
         "test loss of `measured` less this one's (90 % interval), verdict"], rows)


def main() -> None:
    """Trains and compares."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--setting", choices=SETTINGS, default="digits")
    parser.add_argument("--output", type=Path, help="by default runs/deciding_SETTING")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--data_dir", default="", help="of cifar10: TFDS data_dir; empty: TFDS's")
    parser.add_argument("--record", type=Path, help="also keep the runs' logs in this folder")
    options = parser.parse_args()
    config, decides, margin = SETTINGS[options.setting]
    output = options.output or REPOSITORY / "runs" / f"deciding_{options.setting}"
    output, data = output.resolve(), data_settings(options.data_dir)
    with one_line_errors("experiments.deciding"):
        train("measured", config, [f"{RULE},{decides}"] * options.seeds, output, data)
        for name in ("decay", "increase"):
            train(name, config, [f"strategy={name}"] * options.seeds, output, data)
        decided = read(output, ["measured"])["measured"]
        beside = [fixed(run, decided[seed - 1]) for seed, run in enumerate(decided)]
        for name in beside[0]:
            train(name, config, [settings[name] for settings in beside], output, data)
        text = table(read(output), margin)
        output.joinpath("table.md").write_text(text + "\n", encoding="utf-8")
        if options.record:
            records.keep(output, sorted((output / "runs").iterdir()), options.record)
            options.record.joinpath("table.md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
