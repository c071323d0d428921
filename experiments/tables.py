"""Results tables of the paper's figures: our values, the paper's, and a verdict."""

import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from bigbatch.branching.verdicts import Comparison, compare
from bigbatch.dotted import resolve
from experiments import digitised
from experiments.figures import (
    SCALES,
    Curve,
    Figure,
    Panel,
    config_text,
    planned,
)
from experiments.logs import Logs, divergences, finished, updates_of
from experiments.lost_epochs import equivalent_epochs, progress
from experiments.markdown_table import markdown_table
from experiments.verdicts import inside

LABELS = {"train_loss": "training cross entropy"}  # of others their names are
LOST_AT, LOST_WINDOW = (0.25, 0.5), 0.05  # shares of a run where lost epochs are tabulated
TIMED = ("30min",)  # panels of which the paper compares the wall-clock times
LAST_SHARE = 0.1  # of a run, over which its final training loss is averaged
Results = Mapping[str, Sequence[Logs]]  # by Curve.config, one run a seed


class Row(NamedTuple):
    """A curve's results. Values are accuracies as fractions, or training losses."""

    curve: Curve
    runs: Sequence[Logs]
    recipe_updates: int  # at the paper's scale
    values: list[float]  # final, one a seed that did not diverge
    stated: list[float]  # the paper's final accuracies, where it states them
    paper: str  # what is known of the paper's final values, in words; see `_paper`
    # With the first curve; None for that curve, for one seed, and where a run of either diverged.
    comparison: Comparison | None
    inside: bool | None  # whether the paper's stated values lie inside ours; None: no such test
    diverged: str  # see `logs.divergences`
    updates: float  # of the schedule; where runs decide, their mean
    seconds: float | None  # of training, mean over the runs; None where that of one is not known


class Table(NamedTuple):
    """A table's texts."""

    name: str  # of the panel
    header: list[str]
    cells: list[list[str]]
    note: str


class LostEpochs(NamedTuple):
    """A momentum's row of appendix A, in epochs."""

    label: str
    batch_size: int
    tau: float  # B/(N(1-m)): lost in the end
    trained_T: np.ndarray
    # Measured, for each seed of which neither this run nor the first curve's diverged.
    lost_SxT: np.ndarray
    predicted_T: np.ndarray  # epochs lost by theory
    diverged: str  # see `logs.divergences`


def label_of(quantity: str) -> str:
    """What axes and headers call a quantity of metrics.jsonl."""
    return LABELS.get(quantity, quantity.replace("_", " "))


def is_share(quantity: str) -> bool:
    """Whether a quantity is a share of the examples, and told in per cent."""
    return quantity.endswith("_accuracy")


def final_value(run: Logs, quantity: str) -> float:
    """A finished run's last evaluation, or a training quantity averaged over its last tenth."""
    if not quantity.startswith("train_"):
        return run.events[-1][quantity]
    end = run.events[-1]["examples_seen"]
    return statistics.mean(
        event[quantity] for event in run.events
        if event["examples_seen"] > (1 - LAST_SHARE) * end
    )


def rows(panel: Panel, scale: str, results: Results) -> list[Row]:
    """The rows of a panel's curves, in their order."""
    found = []
    margin = SCALES[scale].margins[panel.quantity]
    for curve in panel.curves:
        runs = results[curve.config]
        values = [final_value(run, panel.quantity) for run in finished(runs)]
        stated = list(curve.finals) if panel.quantity == "test_accuracy" else []
        # The runs that are left are not tested, since which runs diverge is not chance alone.
        testable = not divergences(runs)
        comparable = testable and found and not found[0].diverged
        seconds = [run.training_seconds for run in runs]
        found.append(Row(
            curve, runs, recipe_updates(panel, curve), values, stated, _paper(panel, curve),
            compare(values, found[0].values, margin) if comparable else None,
            inside(values, stated) if testable and SCALES[scale].comparable else None,
            divergences(runs), statistics.mean(run.updates for run in runs),
            None if None in seconds else statistics.mean(seconds),
        ))
    return found


def lost_epochs_of(panel: Panel, results: Results) -> list[LostEpochs]:
    """The rows of appendix A: all momenta but the first, with which the others are compared."""
    def losses(run: Logs) -> tuple[np.ndarray, np.ndarray]:
        return tuple(np.array([event[name] for event in run.events])
                     for name in ("epoch", "train_loss"))

    first, *others = panel.curves
    references, found = results[first.config], []
    first_tau = references[0].phases[0]["lost_epochs"]
    end = references[0].phases[-1]["end_example"] / references[0].examples
    trained = np.linspace(0.0, end, 81)[1:]
    for curve in others:
        runs = results[curve.config]
        tau = runs[0].phases[0]["lost_epochs"]
        lost = [
            trained - equivalent_epochs(*losses(run), *losses(reference), first_tau, trained)
            for run, reference in zip(runs, references, strict=True)
            if not divergences([run, reference])]
        found.append(LostEpochs(
            curve.label, runs[0].phases[0]["batch_size"], tau, trained,
            np.reshape(lost, (-1, len(trained))), trained - progress(trained, tau),
            divergences(runs),
        ))
    return found


def make(figure: Figure, scale: str, results: Results) -> list[Table]:
    """The tables of a figure; none where it shows no runs."""
    tables = resolve(figure.tables, "the figure's tables")
    return tables(figure, scale, results) if figure.trained else []


def of_curves(figure: Figure, scale: str, results: Results) -> list[Table]:
    """A table for each distinct set of curves and quantity."""
    distinct = {(panel.curves, panel.quantity): panel for panel in reversed(figure.panels)}
    return [_panel_table(panel, scale, results) for panel in reversed(distinct.values())]


def summary(chosen: Sequence[Figure], scale: str, results: Results) -> Table:
    """One table over figures: each curve's updates and final accuracy, the paper's and ours."""
    panels = {panel.curves: panel for figure in reversed(chosen) if figure.summed_up
              for panel in reversed(figure.panels) if panel.quantity == "test_accuracy"}
    return Table("All figures", [
        "figure", "schedule", "updates, paper", "accuracy, paper", f"updates, {scale}",
        f"accuracy, {scale}", "n", "against the first",
    ], [
        [panel.name, row.curve.label, f"{row.recipe_updates:,}", row.paper, updates_of(row.runs),
         final_text(row.runs, panel.quantity), str(len(row.runs)),
         row.comparison.verdict if row.comparison else ""]
        for panel in reversed(panels.values()) for row in rows(panel, scale, results)
    ], "")


def markdown(table: Table) -> str:
    """A table as Markdown, with its note below."""
    return "\n".join([
        markdown_table(table.header, table.cells), "", table.note + "\n" * bool(table.note)])


def _panel_table(panel: Panel, scale: str, results: Results) -> Table:
    quantity, comparable = panel.quantity, SCALES[scale].comparable
    found = rows(panel, scale, results)
    first = found[0]

    def fewer(told: str, updates: float, most: float) -> str:
        return told + f" ({most / updates:.1f}x fewer)" * (updates != most)

    columns = {
        "curve": lambda row: row.curve.label,
        "n": lambda row: str(len(row.runs)),
        "updates": lambda row: fewer(updates_of(row.runs), row.updates, first.updates),
        "of the paper's recipe": lambda row: fewer(
            f"{row.recipe_updates:,}", row.recipe_updates, first.recipe_updates),
        "the paper says": lambda row: row.curve.updates,
        f"final {label_of(quantity)}": lambda row: final_text(row.runs, quantity),
        "the paper's" if comparable else "the paper's (of its task)": lambda row: row.paper,
        "less the first curve's (90 % interval)": lambda row: (
            _difference(quantity, *row.comparison[:3]) if row.comparison else ""),
        "verdict": lambda row: (
            row.comparison.verdict if row.comparison else
            "the reference" if row is first else
            "none: a run diverged" if row.diverged or first.diverged else "none: one seed"),
        "the paper claims": lambda row: row.curve.claim,
    }
    if comparable:
        columns |= {
            "ours less the paper's": lambda row: (
                _difference(quantity, statistics.mean(row.values) - statistics.mean(row.stated))
                if row.stated and not row.diverged else ""),
            "the paper's inside ours": lambda row: {True: "yes", False: "no", None: ""}[row.inside],
        }
    time = ""
    if panel.name in TIMED and any(row.seconds for row in found):
        columns["training took"] = lambda row: _time(row.seconds)
        columns["the paper's took"] = lambda row: row.curve.took
        devices = set().union(*(run.devices for curve in panel.curves
                                for run in results[curve.config]))
        time = (" Training took: wall clock of a run without compiling and evaluating, mean over "
                f"seeds, beside whatever else the machine did; on {', '.join(sorted(devices))}.")
    margin = _difference(quantity, SCALES[scale].margins[quantity])
    return Table(
        panel.name, list(columns), [[cell(row) for cell in columns.values()] for row in found],
        "Paired over seeds: same where the interval of the mean difference lies within "
        f"±{margin[1:]}; lower or higher where it does not and holds no 0; else undecided. Values "
        "with ~ were read off the paper's plots (accuracies ±0.3 points; a range is of all curves' "
        "ends; its training loss may include the weight decay's term)." + time,
    )


def of_lost_epochs(figure: Figure, scale: str, results: Results) -> list[Table]:
    """The table of appendix A."""
    (panel,) = figure.panels

    def cells(row: LostEpochs, share: float) -> list[str]:
        """Measured and predicted, around a share of the run."""
        around = np.abs(row.trained_T / row.trained_T[-1] - share) <= LOST_WINDOW
        lost_S = row.lost_SxT[:, around].mean(axis=1)
        predicted = row.predicted_T[around].mean()
        deviation = f" ± {lost_S.std(ddof=1):.2f}" if len(lost_S) > 1 else ""
        return [f"{lost_S.mean():.2f}{deviation}" if len(lost_S) else "", f"{predicted:.2f}"]

    found, first = lost_epochs_of(panel, results), panel.curves[0]
    (run, *_) = results[first.config]
    end = run.phases[-1]["end_example"] / run.examples
    header = ["momentum", "batch", "n", "lost in the end, predicted"]
    for share in LOST_AT:
        header += [f"lost after {share * end:.1f} epochs", "predicted"]
    broken = divergences(results[first.config])
    return [Table(
        panel.name, header,
        [[row.label, str(row.batch_size),
          "; ".join(filter(None, [str(len(row.lost_SxT)), row.diverged])), f"{row.tau:.2f}",
          *(cell for share in LOST_AT for cell in cells(row, share))] for row in found],
        "Epochs. Predicted: tau (1 - exp(-t/tau)) with tau = B/(N(1-m)). Measured: how much later "
        f"than with {first.label} the same training loss was reached; runs differ in "
        "momentum and batch alone." + f" With {first.label} {broken}." * bool(broken),
    )]


def recipe_updates(panel: Panel, curve: Curve) -> int:
    """A curve's updates at the paper's scale, or at its own, as the planner counts them."""
    scale = next(name for name, scale in SCALES.items() if panel.family in scale.files)
    _, phases = planned(config_text(scale, panel, curve, 0))
    return sum(phase.updates for phase in phases)


def _number(value: float, quantity: str) -> str:
    return f"{100 * value:.1f} %" if is_share(quantity) else f"{value:.3f}"


def _difference(quantity: str, value: float, *interval: float) -> str:
    """A difference with its sign and unit, and with its confidence interval where that is given."""
    scale, digits, unit = (100, 2, " points") if is_share(quantity) else (1, 3, "")
    value, *ends = (f"{scale * number:+.{digits}f}" for number in (value, *interval))
    return value + f" ({' to '.join(ends)})" * bool(ends) + unit


def _paper(panel: Panel, curve: Curve) -> str:
    """What is known of the paper's final values; "~" before a value that was read off a plot.

    The end of a plotted curve that is hidden near its end is not known.
    """
    if curve.finals and panel.quantity == "test_accuracy":
        stated = ", ".join(_number(value, panel.quantity) for value in curve.finals)
        return stated if curve.median is None else (
            f"{stated} (median of five more, from memory: {_number(curve.median, panel.quantity)})")
    found = [stretch for stretch in digitised.read() if stretch.panel == panel.name]
    last = {stretch.curve: stretch for stretch in found}
    near = 0.95 * max((stretch.end for stretch in found), default=0)
    return ", ".join("~" + _number(last[name].mean, panel.quantity) for name in curve.plotted
                     if name in last and last[name].end >= near) or panel.ends


def final_text(runs: Sequence[Logs], quantity: str) -> str:
    """The mean and deviation of the runs that finished, and when the others diverged."""
    values = [final_value(run, quantity) for run in finished(runs)]
    return "; ".join(filter(None, [_mean(values, quantity) if values else "", divergences(runs)]))


def _time(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds:.1f} s" if seconds < 600 else f"{seconds / 60:.1f} min"


def _mean(values: Sequence[float], quantity: str) -> str:
    """The mean with the standard deviation, in the quantity's unit."""
    scale, digits, unit = (100, 2, " %") if is_share(quantity) else (1, 3, "")
    deviation = f" ± {scale * statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{scale * statistics.mean(values):.{digits}f}{deviation}{unit}"
