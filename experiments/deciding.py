"""Does a run that decides when its batch grows end better than the best schedule made beforehand?

    python -m experiments.deciding --output=runs/deciding

Digits, with the strategy `measured` and several seeds. Each of its runs is set beside schedules
that are fixed in advance and take as many updates, as exactly as whole batches allow: one batch
from the start; one that grows once to the largest, or twice, at the place at which the number of
updates comes out the same; and what another seed has decided. Which of these is best is chosen with
hindsight, so that what is compared with is better than what one could have known. The same command
again continues what is there.
"""

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

from bigbatch.branching.verdicts import compare
from experiments import logs, records, runs
from experiments.command_line import one_line_errors
from experiments.figures import REPOSITORY
from experiments.logs import Logs
from experiments.markdown_table import markdown_table

# 12 epochs with falls where the demonstration has them, and four ghost batches in the first batch.
SETTING = ("configs/digits.py:decay,recipe.batch_size=32,ghost_size=8,recipe.epochs=12,"
           "recipe.falls=((3.6,3),(7.2,3),(9.6,3)),tensorboard=false,checkpoint_every_epochs=100")
DECIDES = ("strategy=measured,measured.rule=noise,measured.threshold=1,noise.window_epochs=1,"
           "measured.every_epochs=0.25,measured.stay_epochs=1")
# The schedules, by what the folders of their runs are called.
SCHEDULES = {
    "measured": "measured", "decay": "decay", "onebatch": "one batch", "growsonce": "grows once",
    "growstwice": "grows twice", "anotherseedsdecisions": "another seed's decisions",
}
MARGIN = 0.01  # nats of test loss that are called the same; stated before any of these runs


def fixed(run: Logs, other: Logs) -> dict[str, str]:
    """The settings of schedules with as many updates as `run`, by their keys in SCHEDULES.

    Args:
        run: one that has decided.
        other: one of another seed.
    """
    first, examples = run.phases[0]["batch_size"], run.phases[-1]["nominal_end_example"]
    largest, ghost = run.config["limits"]["max_batch_size"], run.config["ghost_size"]
    middle = 2 * first
    # start/first + (examples - start)/largest = updates; and with `start` more in `middle`
    left = run.updates - examples / largest
    once = left / (1 / first - 1 / largest)
    twice = left / (1 / first + 1 / middle - 2 / largest)
    once, twice = (round(start / middle) * middle for start in (once, twice))
    constant = round(examples / run.updates / ghost) * ghost
    growths = [(event["examples_seen"], event["grows_to"])
               for event in other.events if "grows_to" in event]
    return {
        "onebatch": f"scale_up.learning_rate={constant / first}",
        "growsonce": by_hand([(once, largest)]),
        "growstwice": by_hand([(twice, middle), (2 * twice, largest)]),
        "anotherseedsdecisions": by_hand(growths),
    }


def by_hand(pairs: Sequence[tuple[int, int]]) -> str:
    """The settings of a run with batches by hand, (example, batch from there on)."""
    listed = ",".join(f"('{example} examples',{batch})" for example, batch in pairs)
    return f"strategy=by_hand,by_hand=({listed},)"


def train(name: str, settings: Sequence[str], output: Path) -> None:
    """Trains a schedule with its settings for each seed, where that is not done."""
    runs.train_missing(
        [runs.Run(f"{SETTING},{text + ',' * bool(text)}seed={seed}",
                  output / "runs" / f"{name}-{seed}") for seed, text in enumerate(settings)],
        output, "experiments.deciding", at_once=1)


def read(folder: Path) -> dict[str, list[Logs]]:
    """The runs of each schedule, from a workdir or a record; of those that are there."""
    with records.opened(folder) as opened:
        found = {name: sorted((opened / "runs").glob(f"{name}-*")) for name in SCHEDULES}
        return {name: list(map(logs.read_run, paths)) for name, paths in found.items() if paths}


def final(found: Sequence[Logs], quantity: str) -> list[float]:
    """The last value of each run."""
    return [run.events[-1][quantity] for run in found]


def table(results: dict[str, list[Logs]]) -> str:
    """Each schedule's updates and ends, and how the deciding runs compare with it."""
    rows, losses = [], {name: final(found, "test_loss") for name, found in results.items()}
    best = min((name for name in losses if name not in ("measured", "decay")),
               key=lambda name: statistics.mean(losses[name]))
    for name, found in results.items():
        told = ""
        if name != "measured":
            against = compare(losses["measured"], losses[name], MARGIN)
            told = (f"{against.difference:+.4f} ({against.low:+.4f} to {against.high:+.4f}), "
                    f"{against.verdict}")
        updates = [run.updates for run in found]
        rows.append([
            SCHEDULES[name] + ", the best of these" * (name == best), str(len(found)),
            f"{statistics.mean(updates):.0f} ({min(updates)} to {max(updates)})",
            f"{statistics.mean(losses[name]):.4f}",
            f"{statistics.mean(final(found, 'test_accuracy')):.2%}", told])
    return markdown_table(
        ["schedule", "seeds", "updates", "test loss", "test accuracy",
         "test loss of `measured` less this one's (90 % interval), verdict"], rows)


def main() -> None:
    """Trains and compares."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--output", type=Path, default=REPOSITORY / "runs" / "deciding")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--record", type=Path, help="also keep the runs' logs in this folder")
    options = parser.parse_args()
    output = options.output.resolve()
    with one_line_errors("experiments.deciding"):
        train("measured", [DECIDES] * options.seeds, output)
        train("decay", [""] * options.seeds, output)
        decided = read(output)["measured"]
        beside = [fixed(run, decided[seed - 1]) for seed, run in enumerate(decided)]
        for name in beside[0]:
            train(name, [settings[name] for settings in beside], output)
        text = table(read(output))
        output.joinpath("table.md").write_text(text + "\n", encoding="utf-8")
        if options.record:
            records.keep(output, sorted((output / "runs").iterdir()), options.record)
            options.record.joinpath("table.md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
