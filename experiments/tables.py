"""Results tables of the paper's figures: what ours came to, what the paper's did, and a verdict."""

import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from bigbatch.dotted import resolve
from experiments.figures import (
    SCALES,
    Curve,
    Figure,
    Panel,
    config_text,
    planned,
    read_digitised,
)
from experiments.logs import Logs, divergences, finished
from experiments.lost_epochs import progress, worth
from experiments.markdown_table import markdown_table
from experiments.verdicts import Comparison, compare, inside

LABELS = {"train_loss": "training cross entropy", "test_accuracy": "test accuracy"}
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
    # With the first curve; None of that itself, of one seed, and where a run of either diverged.
    comparison: Comparison | None
    inside: bool | None  # whether what the paper states lies inside ours; None: cannot be asked

    @property
    def diverged(self) -> str:
        """See `logs.divergences`."""
        return divergences(self.runs)

    @property
    def updates(self) -> int:
        """Of its schedule."""
        return self.runs[0].updates

    @property
    def seconds(self) -> float | None:
        """Of training, mean over the runs; None where that of one is not known."""
        seconds = [run.training_seconds for run in self.runs]
        return None if None in seconds else statistics.mean(seconds)


class Table(NamedTuple):
    """Text, ready to be laid out."""

    name: str  # of the panel
    header: list[str]
    cells: list[list[str]]
    note: str


class LostEpochs(NamedTuple):
    """A momentum's row of appendix A, in epochs."""

    label: str
    batch_size: int
    tau: float  # B/(N(1-m)): lost in the end
    trained: np.ndarray  # T
    # How many epochs with a full accumulator, measured, for each seed of which neither this run nor
    # the one it is measured against diverged.
    worth_SxT: np.ndarray
    predicted_T: np.ndarray  # the same, by theory
    diverged: str  # see `logs.divergences`


def final_value(run: Logs, quantity: str) -> float:
    """Of a finished run: the last evaluation, or the training loss averaged over its last tenth."""
    if quantity != "train_loss":
        return run.events[-1][quantity]
    end = run.events[-1]["examples_seen"]
    return statistics.mean(
        event[quantity] for event in run.events
        if event["examples_seen"] > (1 - LAST_SHARE) * end
    )


def rows(panel: Panel, scale: str, results: Results) -> list[Row]:
    """A panel's rows, in its order."""
    found = []
    margin = SCALES[scale].margins[panel.quantity]
    for curve in panel.curves:
        runs = results[curve.config]
        values = [final_value(run, panel.quantity) for run in finished(runs)]
        stated = list(curve.finals) if panel.quantity == "test_accuracy" else []
        # Of the runs that are left nothing is said: which diverge is no matter of chance alone.
        testable = not divergences(runs)
        comparable = testable and found and not found[0].diverged
        found.append(Row(
            curve, runs, recipe_updates(panel, curve), values, stated, _paper(panel, curve),
            compare(values, found[0].values, margin) if comparable else None,
            inside(values, stated) if testable and SCALES[scale].comparable else None,
        ))
    return found


def lost_epochs_of(panel: Panel, results: Results) -> list[LostEpochs]:
    """The rows of appendix A: all momenta but the first, which the others are measured against."""
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
        measured = [worth(*losses(run), *losses(reference), first_tau, trained)
                    for run, reference in zip(runs, references, strict=True)
                    if not divergences([run, reference])]
        found.append(LostEpochs(
            curve.label, runs[0].phases[0]["batch_size"], tau, trained,
            np.reshape(measured, (-1, len(trained))), progress(trained, tau), divergences(runs),
        ))
    return found


def make(figure: Figure, scale: str, results: Results) -> list[Table]:
    """The tables of a figure."""
    return resolve(figure.tables, "the figure's tables")(figure, scale, results)


def none(figure: Figure, scale: str, results: Results) -> list[Table]:
    """Of a figure that shows no runs."""
    return []


def of_curves(figure: Figure, scale: str, results: Results) -> list[Table]:
    """One for each distinct set of curves and quantity."""
    distinct = {(panel.curves, panel.quantity): panel for panel in reversed(figure.panels)}
    return [_panel_table(panel, scale, results) for panel in reversed(distinct.values())]


def summary(chosen: Sequence[Figure], scale: str, results: Results) -> Table:
    """One table over figures: each curve's updates and final accuracy, the paper's and ours."""
    cells, seen = [], set()
    for figure in chosen:
        for panel in figure.panels:
            if (not figure.summed_up or panel.quantity != "test_accuracy"
                    or panel.curves in seen):
                continue
            seen.add(panel.curves)
            for row in rows(panel, scale, results):
                cells.append([
                    panel.name, row.curve.label, f"{row.recipe_updates:,}",
                    row.paper, f"{row.updates:,}", _final(row, panel.quantity), str(len(row.runs)),
                    row.comparison.verdict if row.comparison else "",
                ])
    return Table("All figures", [
        "figure", "schedule", "updates, paper", "accuracy, paper", f"updates, {scale}",
        f"accuracy, {scale}", "n", "against the first",
    ], cells, "")


def markdown(table: Table) -> str:
    """A table as Markdown, with its note below."""
    return "\n".join([
        markdown_table(table.header, table.cells), "", table.note + "\n" * bool(table.note)])


def _panel_table(panel: Panel, scale: str, results: Results) -> Table:
    quantity, comparable = panel.quantity, SCALES[scale].comparable
    found = rows(panel, scale, results)
    first = found[0]

    def fewer(updates: int, most: int) -> str:
        return f"{updates:,}" + f" ({most / updates:.1f}x fewer)" * (updates != most)

    columns = {
        "curve": lambda row: row.curve.label,
        "n": lambda row: str(len(row.runs)),
        "updates": lambda row: fewer(row.updates, first.updates),
        "of the paper's recipe": lambda row: fewer(row.recipe_updates, first.recipe_updates),
        "the paper says": lambda row: row.curve.updates,
        f"final {LABELS[quantity]}": lambda row: _final(row, quantity),
        "the paper's" if comparable else "the paper's (of its task)": (
            lambda row: row.paper),
        "less the first curve's (90 % interval)": lambda row: (
            _interval(row.comparison, quantity) if row.comparison else ""),
        "verdict": lambda row: (
            row.comparison.verdict if row.comparison else
            "the reference" if row is first else
            "none: a run diverged" if row.diverged or first.diverged else "none: one seed"),
        "the paper claims": lambda row: row.curve.claim,
    }
    if comparable:
        columns |= {
            "ours less the paper's": lambda row: (
                _number(statistics.mean(row.values) - statistics.mean(row.stated), quantity,
                        signed=True) if row.stated and not row.diverged else ""),
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
    margin = _number(SCALES[scale].margins[quantity], quantity, signed=True)
    return Table(
        panel.name, list(columns), [[cell(row) for cell in columns.values()] for row in found],
        "Paired over seeds: same where the interval of the mean difference lies within "
        f"±{margin[1:]}; lower or higher where it does not and holds no 0; else undecided. Values "
        "with ~ were read off the paper's plots (accuracies ±0.3 points; a range is of all curves' "
        "ends; its training loss may include the weight decay's term)." + time,
    )


def of_lost_epochs(figure: Figure, scale: str, results: Results) -> list[Table]:
    """Appendix A's one table."""
    (panel,) = figure.panels

    def cells(row: LostEpochs, share: float) -> list[str]:
        """Measured and predicted, around a share of the run."""
        end = row.trained[-1]
        around = np.abs(row.trained / end - share) <= LOST_WINDOW
        lost_S = (row.trained - row.worth_SxT)[:, around].mean(axis=1)
        predicted = (row.trained - row.predicted_T)[around].mean()
        deviation = f" ± {lost_S.std(ddof=1):.2f}" if len(lost_S) > 1 else ""
        return [f"{lost_S.mean():.2f}{deviation}" if len(lost_S) else "", f"{predicted:.2f}"]

    found = lost_epochs_of(panel, results)
    end = found[0].trained[-1]
    header = ["momentum", "batch", "n", "lost in the end, predicted"]
    for share in LOST_AT:
        header += [f"lost after {share * end:.1f} epochs", "predicted"]
    first = panel.curves[0]
    broken = divergences(results[first.config])
    return [Table(
        panel.name, header,
        [[row.label, str(row.batch_size),
          "; ".join(filter(None, [str(len(row.worth_SxT)), row.diverged])), f"{row.tau:.2f}",
          *(cell for share in LOST_AT for cell in cells(row, share))] for row in found],
        "Epochs. Predicted: tau (1 - exp(-t/tau)) with tau = B/(N(1-m)). Measured: how much later "
        f"than with {first.label} the same training loss was reached; runs differ in "
        "momentum and batch alone." + f" With {first.label} {broken}." * bool(broken),
    )]


def recipe_updates(panel: Panel, curve: Curve) -> int:
    """Of a curve at the paper's scale, as the planner counts them."""
    _, phases = planned(config_text("paper", panel, curve, 0))
    return sum(phase.updates for phase in phases)


def _plotted_finals(panel: Panel, names: Sequence[str]) -> list[float]:
    """The last values of the paper's plotted curves, where they are seen to near the end."""
    finals = []
    for name in names:
        found = [s for s in read_digitised() if (s.panel, s.curve) == (panel.name, name)]
        ends = [s.end for s in read_digitised() if s.panel == panel.name]
        if found and found[-1].end >= 0.95 * max(ends):
            finals.append(found[-1].mean)
    return finals


def _number(value: float, quantity: str, signed: bool = False) -> str:
    if quantity == "train_loss":
        return f"{value:+.3f}" if signed else f"{value:.3f}"
    return f"{100 * value:+.2f} points" if signed else f"{100 * value:.1f} %"


def _paper(panel: Panel, curve: Curve) -> str:
    """What is known of the paper's final values; "~" before what was read off a plot."""
    if curve.finals and panel.quantity == "test_accuracy":
        stated = ", ".join(_number(value, panel.quantity) for value in curve.finals)
        return stated if curve.median is None else (
            f"{stated} (median of five more, from memory: {_number(curve.median, panel.quantity)})")
    plotted = [_number(value, panel.quantity) for value in _plotted_finals(panel, curve.plotted)]
    return ", ".join("~" + value for value in plotted) or panel.ends


def _final(row: Row, quantity: str) -> str:
    """The mean of the runs that finished, and when the others diverged."""
    ours = mean(row.values, quantity) if row.values else ""
    return "; ".join(filter(None, [ours, row.diverged]))


def _time(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds:.1f} s" if seconds < 600 else f"{seconds / 60:.1f} min"


def mean(values: Sequence[float], quantity: str) -> str:
    """The mean with the standard deviation, in the quantity's unit."""
    scale, digits, unit = (1, 3, "") if quantity == "train_loss" else (100, 2, " %")
    deviation = f" ± {scale * statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{scale * statistics.mean(values):.{digits}f}{deviation}{unit}"


def _interval(compared: Comparison, quantity: str) -> str:
    scale, digits, unit = (1, 3, "") if quantity == "train_loss" else (100, 2, " points")
    mean, low, high = (f"{scale * value:+.{digits}f}" for value in compared[:3])
    return f"{mean} ({low} to {high}){unit}"
