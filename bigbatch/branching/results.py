"""What the branches of runs have come to: their losses, a table, and a picture."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tabulate

from bigbatch.branching import verdicts
from bigbatch.branching.branches import Branch
from bigbatch.mistake import Mistake
from bigbatch.storage.logs import finite, read_events

QUANTITY = "test_loss"  # every task has it; larger is worse


def losses_of(branch: Branch) -> np.ndarray | None:
    """The losses of a branch over the test set, at the evaluations of its stretch: (evaluations,).

    nan where one is not finite, and from where the branch diverged; None if the branch has not come
    to its end.
    """
    start, end, every, _ = branch.stretch
    found = {event["examples_seen"]: event[QUANTITY]
             for event in read_events(branch.folder / "metrics.jsonl") if QUANTITY in event}
    wanted = range(start + every, end + 1, every)
    if not found.keys() >= set(wanted) and not any(
            event["event"] == "diverged" for event in read_events(branch.folder / "timing.jsonl")):
        return None
    return np.array([found.get(at) for at in wanted], float)  # which makes nan of None


def judge(
    branches: Sequence[Branch], losses: Sequence[np.ndarray], margin: float
) -> dict[str, Any]:
    """The comparison of all branches, as JSON values.

    Args:
        branches: of each run, each order and each factor, in this order.
        losses: of each branch, see `losses_of`.
        margin: by how much the loss of a branch may be higher.

    Returns:
        `quantity`, `margin`, `batch_size` of the runs, `examples` of the stretch,
        `compared_from` (the examples of the stretch after which evaluations are compared),
        `paired_over` and what this means as `interval`, `verdict` as a sentence, `critical_batch`
        (the largest batch that is as good as all smaller ones are), `worse_batch` (the smallest
        that is worse; None if none is), and `factors`: each with `factor`, `batch_size`, `loss`
        (the mean of what is compared), `difference`, `low`, `high`, `pairs`, `verdict` and
        `curve` ([examples of the stretch, mean loss], ...).

    Raises:
        Mistake: if a loss of the factor 1 that is compared is not finite.
    """
    factors = sorted({branch.factor for branch in branches})
    sources = list(dict.fromkeys(branch.source for branch in branches))
    stretch = branches[0].stretch
    whole = {factor: np.array([
        [loss for branch, loss in zip(branches, losses, strict=True)
         if (branch.source, branch.factor) == (source, factor)] for source in sources])
        for factor in factors}  # losses_RxOxE
    half = whole[1].shape[2] // 2
    for branch, loss in zip(branches, losses, strict=True):
        if branch.factor == 1 and not np.isfinite(loss[half:]).all():
            raise Mistake(
                f"the branch in {branch.folder}, of the factor 1, has losses that are not finite: "
                "the run itself diverges in this stretch, so there is nothing to compare others "
                "with. Branch from an earlier checkpoint, or over fewer examples by --for.")
    over, found = verdicts.of_factors(
        {factor: array[:, :, half:] for factor, array in whole.items()}, margin)
    passing, failing = verdicts.critical(found)
    batch = stretch.batch_size
    rows = []
    for one in found:
        comparison, array = one.comparison, whole[one.factor]
        rows.append({
            "factor": one.factor, "batch_size": one.factor * batch,
            "loss": float(array[:, :, half:].mean()),
            "difference": comparison and comparison.difference,
            "low": comparison and comparison.low, "high": comparison and comparison.high,
            "pairs": one.pairs,
            "verdict": {True: "as good", False: "worse", None: "undecided"}[one.passes],
            "curve": [[(index + 1) * stretch.every, float(loss)]
                      for index, loss in enumerate(array.mean(axis=(0, 1)))],
        })
    return finite({
        "quantity": QUANTITY, "margin": margin, "batch_size": batch,
        "examples": stretch.end - stretch.start, "compared_from": half * stretch.every,
        "paired_over": over, "interval": verdicts.PAIRED_OVER[over],
        "verdict": verdicts.told(found, batch), "critical_batch": passing * batch,
        "worse_batch": failing and failing * batch, "factors": rows,
    })


def table(judged: Mapping[str, Any]) -> str:
    """The result of `judge` for the terminal."""
    def cell(value: float | None, sign: str = "") -> str:
        return "diverged" if value is None else f"{value:{sign}.4g}"

    rows = [
        [row["factor"], row["batch_size"], cell(row["loss"]),
         *([cell(row["difference"], "+"), f"{row['low']:+.4g} to {row['high']:+.4g}"]
           if row["difference"] is not None else ["", ""]), row["verdict"]]
        for row in judged["factors"]]
    return "\n\n".join([
        tabulate.tabulate(rows, ["factor", "batch", "test loss", "difference", "90 % interval", ""],
                          tablefmt="plain", disable_numparse=True, stralign="right"),
        f"{judged['verdict']} (Margin {judged['margin']:g}; means over the evaluations from "
        f"{judged['compared_from']} of the {judged['examples']} examples on.)",
        f"The pairs are {judged['interval']}."])


def draw(file: Path, judged: Mapping[str, Any]) -> None:
    """Draws the losses of the branches, and their differences against the batch.

    Raises:
        Mistake: if matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure  # only this picture needs it
    except ImportError:
        raise Mistake("the picture needs matplotlib: pip install matplotlib.") from None
    figure = Figure(figsize=(10, 4), layout="constrained")
    curves, differences = figure.subplots(1, 2)
    for row in judged["factors"]:
        across, values = zip(*row["curve"], strict=True)
        curves.plot(across, [math.nan if value is None else value for value in values],
                    label=f"batch {row['batch_size']}")
    curves.axvspan(judged["compared_from"], judged["examples"], color="black", alpha=0.06)
    curves.set(xlabel="examples since the checkpoint", ylabel="test loss",
               title="branches; compared where it is grey")
    curves.legend(frameon=False, fontsize=8)
    for row in judged["factors"]:
        if row["difference"] is not None:
            differences.errorbar(
                row["batch_size"], row["difference"], fmt="o", color="C0", capsize=3,
                yerr=[[row["difference"] - row["low"]], [row["high"] - row["difference"]]])
    differences.axhspan(-judged["margin"], judged["margin"], color="C2", alpha=0.15)
    differences.axhline(0, color="black", linewidth=0.8)
    differences.axvline(judged["critical_batch"], color="C2", linestyle="--",
                        label=f"as good up to {judged['critical_batch']}")
    differences.set(xscale="log", xlabel="batch", ylabel="difference in test loss",
                    title="difference, with its 90 % interval and the margin")
    differences.legend(frameon=False, fontsize=8)
    try:
        figure.savefig(file, dpi=110)
    except OSError as error:
        raise Mistake(f"{file} cannot be written: {error}") from None
