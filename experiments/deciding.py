"""Does a run that decides when its batch grows end better than the best schedule made beforehand?

    python -m experiments.deciding --output=runs/deciding

Digits, with the strategy `measured` and several seeds. Each of its runs is set beside schedules
that are fixed in advance and take as many updates: the batch grows once, by each factor that the
ladder has, at the one example at which the number of updates comes out the same. Which of these is
best is chosen with hindsight, so that what is compared with is better than what one could have
known. The same command again continues what is there.
"""

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

from bigbatch.branching.verdicts import compare
from bigbatch.config import make_limits, make_recipe
from bigbatch.schedule import deciding
from experiments import logs, records, runs
from experiments.command_line import one_line_errors
from experiments.figures import REPOSITORY, planned
from experiments.logs import Logs
from experiments.markdown_table import markdown_table

# 12 epochs with falls where the demonstration has them, and four ghost batches in the first batch.
SETTING = ("configs/digits.py:decay,recipe.batch_size=32,ghost_size=8,recipe.epochs=12,"
           "recipe.falls=((3.6,3),(7.2,3),(9.6,3)),tensorboard=false,checkpoint_every_epochs=100")
DECIDES = ("strategy=measured,measured.rule=noise,measured.threshold=1,noise.window_epochs=1,"
           "measured.every_epochs=0.25,measured.stay_epochs=1")
MARGIN = 0.01  # nats of test loss that are called the same; stated before any of these runs


def fixed(run: Logs, factor: int) -> str:
    """The settings of a run whose batch grows once, by `factor`, with as many updates as `run`."""
    first, examples = run.phases[0]["batch_size"], run.phases[-1]["nominal_end_example"]
    grown = first * factor
    # start/first + (examples - start)/grown = updates
    start = (run.updates - examples / grown) / (1 / first - 1 / grown)
    if not first <= start < examples - grown:
        return ""  # no place gives as many
    start = round(start / first) * first
    return f"strategy=by_hand,by_hand=(('{start} examples',{grown}),)"


def train(configs: Sequence[tuple[str, str]], output: Path) -> list[Logs]:
    """Trains the configs, (name of the folder, text as of --config), and reads their logs."""
    wanted = [runs.Run(text, output / "runs" / name) for name, text in configs]
    runs.train_missing(wanted, output, "experiments.deciding", at_once=1)
    return [logs.read_run(run.workdir) for run in wanted]


def final(found: Sequence[Logs], quantity: str) -> list[float]:
    """The last value of each run."""
    return [run.events[-1][quantity] for run in found]


def table(results: dict[str, list[Logs]]) -> str:
    """Each schedule's updates and ends, and how the deciding runs compare with the best of them."""
    rows, losses = [], {name: final(found, "test_loss") for name, found in results.items()}
    same = {name: found for name, found in losses.items() if name.startswith("grows")}
    best = min(same, key=lambda name: statistics.mean(same[name]))
    for name, found in results.items():
        told = ""
        if name != "measured":
            against = compare(losses["measured"], losses[name], MARGIN)
            told = (f"{against.difference:+.4f} ({against.low:+.4f} to {against.high:+.4f}), "
                    f"{against.verdict}")
        updates = [run.updates for run in found]
        rows.append([
            name + ", the best" * (name == best), str(len(found)),
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
        configs = [(f"measured-{seed}", f"{SETTING},{DECIDES},seed={seed}")
                   for seed in range(options.seeds)]
        configs += [(f"decay-{seed}", f"{SETTING},seed={seed}") for seed in range(options.seeds)]
        found = train(configs, output)
        results = {"measured": found[: options.seeds], "decay": found[options.seeds :]}
        config, _ = planned(configs[0][1])
        rungs = deciding.ladder(make_recipe(config), make_limits(config))
        for factor in (rung // rungs[0] for rung in rungs[1:]):
            settings = [fixed(run, factor) for run in results["measured"]]
            if all(settings):
                configs += (own := [
                    (f"grows-{factor}-{seed}", f"{SETTING},{setting},seed={seed}")
                    for seed, setting in enumerate(settings)])
                results[f"grows once, by {factor}"] = train(own, output)
        text = table(results)
        output.joinpath("table.md").write_text(text + "\n", encoding="utf-8")
        if options.record:
            records.keep(output, [output / "runs" / name for name, _ in configs], options.record)
            options.record.joinpath("table.md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
