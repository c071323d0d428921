"""Figures as data: their curves' configs at every scale; the statistical tests behind verdicts."""

import re
import statistics
import subprocess
import sys

import numpy as np
import pytest

from bigbatch.branching.verdicts import compare
from bigbatch.storage.continuing import flatten
from experiments import digitised, figures, lost_epochs, selection, verdicts

CURVES = [
    pytest.param(panel, curve, id=f"{panel.name}-{curve.label}")
    for figure in figures.FIGURES.values() if figure.papers
    for panel in figure.panels for curve in panel.curves
]


def plan(scale, panel, curve):
    config, phases = figures.planned(figures.config_text(scale, panel, curve, 1))
    assert config.seed == 1
    return config, phases


@pytest.mark.parametrize("panel, curve", CURVES)
def test_every_scale_has_the_papers_schedule_in_small(panel, curve):
    """Falls at the same fractions, batches and noise in the same ratios, updates as many fewer."""
    first = panel.curves[0]
    _, paper_first = plan("paper", panel, first)
    paper_config, paper = plan("paper", panel, curve)
    if curve.updates:
        stated, found = int(re.sub(r"\D", "", curve.updates)), sum(p.updates for p in paper)
        # 3 519 is "under 3 500" when an epoch's last partial batch is dropped.
        assert found == pytest.approx(stated, rel=0.065)
        assert found < stated * 1.01 or "under" not in curve.updates
    for scale, has in figures.SCALES.items():
        if panel.family not in has.files or panel.name not in (has.panels or panel.name):
            continue
        config, phases = plan(scale, panel, curve)
        _, phases_first = plan(scale, panel, first)
        assert config.optimizer.name == paper_config.optimizer.name
        assert [(phase.name, phase.momentum) for phase in phases] == [
            (phase.name, phase.momentum) for phase in paper]
        assert [phase.batch_size / phases_first[0].batch_size for phase in phases] == [
            phase.batch_size / paper_first[0].batch_size for phase in paper]
        np.testing.assert_allclose(
            [phase.learning_rate_end / phases_first[-1].learning_rate for phase in phases],
            [phase.learning_rate_end / paper_first[-1].learning_rate for phase in paper])
        # Of one family's curves; the families' first noise scales are their own.
        np.testing.assert_allclose(
            [phase.noise_scale_approximate / phases_first[-1].noise_scale_approximate
             for phase in phases[1:]],
            [phase.noise_scale_approximate / paper_first[-1].noise_scale_approximate
             for phase in paper[1:]])
        np.testing.assert_allclose(
            [phase.nominal_end_example / phases[-1].nominal_end_example for phase in phases],
            [phase.nominal_end_example / paper[-1].nominal_end_example for phase in paper],
            atol=0.001)
        fewer, paper_fewer = (
            sum(phase.updates for phase in most) / sum(phase.updates for phase in ours)
            for most, ours in ((phases_first, phases), (paper_first, paper)))
        # Whole updates: the last phase of a small run has few.
        assert fewer == pytest.approx(paper_fewer, rel=0.02)


@pytest.mark.parametrize("names, panels", [
    ("3", ["3a", "3b"]), ("3b", ["3b"]), ("5,2b", ["2b", "5"]), ("3b,3a", ["3a", "3b"]),
    ("A", ["A"]), ("30min,1", ["1", "30min"]),
    ("all", [panel.name for figure in figures.FIGURES.values() if figure.papers
             for panel in figure.panels]),
    ("cosine", ["cosine a", "cosine b"]), ("exchange,1", ["1", "exchange"]),
])
def test_figures_are_chosen_by_name(names, panels):
    assert [p.name for figure in selection.select(names, "small") for p in figure.panels] == panels


@pytest.mark.parametrize("names, scale, said", [
    ("8", "small", "'8'; at the scale small there are 1, 2, 2a, 2b, 3"), ("3,x", "paper", "'x'"),
    ("", "small", "is empty"),
    ("5,6", "medium", "'6'; at the scale medium there are 1, 2, 2a, 2b, 3, 3a, 5, or all"),
])
def test_a_figure_that_is_not_there_is_refused(names, scale, said):
    with pytest.raises(ValueError, match=said):
        selection.select(names, scale)


@pytest.mark.parametrize("scale", ["paper", "small", "digits"])
def test_what_is_beyond_the_paper_differs_in_nothing_but_its_schedule(scale):
    """Under the cosine one noise at every epoch; with Adam's exchanges one path of the batch."""
    for name, free in (("cosine", {"strategy", "limits.growth"}), ("exchange", {
            "strategy", "exchange"})):
        panel = figures.FIGURES[name].panels[0]
        first, *others = [plan(scale, panel, curve) for curve in panel.curves]
        same = flatten(first[0].to_dict())
        for config, _ in others:
            ours = flatten(config.to_dict())
            assert {key for key in ours if ours[key] != same[key]} <= free
        updates = [sum(phase.updates for phase in phases) for _, phases in [first, *others]]
        if name == "cosine":
            assert updates[0] > updates[1] > updates[2]
            assert updates[2] / updates[0] == pytest.approx(0.61, abs=0.01)
        else:
            assert len(set(updates[1:])) == 1
            batches = {tuple(phase.batch_size for phase in phases) for _, phases in others}
            assert len(batches) == 1


def test_the_medium_scale_is_the_papers_but_for_its_length_and_network():
    """Batches, rates, momenta, noise scales and all other keys are the paper's."""
    for panel, curve in ((p, c) for f in selection.select("all", "medium") for p in f.panels
                         for c in p.curves):
        config, phases = plan("medium", panel, curve)
        papers, papers_phases = plan("paper", panel, curve)
        for phase, other in zip(phases, papers_phases, strict=True):
            for name in ("batch_size", "learning_rate", "momentum", "noise_scale"):
                assert getattr(phase, name) == pytest.approx(getattr(other, name))
        ours, theirs = (flatten(each.to_dict()) for each in (config, papers))
        assert {key for key in ours if ours[key] != theirs[key]} == {
            "model.depth", "model.width", "recipe.epochs", "recipe.falls", "dtype",
            "checkpoint_every_epochs", "tensorboard"}


def test_figures_are_listed_without_matplotlib():
    script = "import sys, experiments.figures; sys.exit('matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], cwd=figures.REPOSITORY, check=True)


def test_the_papers_points_belong_to_curves_that_are_drawn():
    drawn = {(panel.name, name) for figure in figures.FIGURES.values() for panel in figure.panels
             for curve in panel.curves for name in curve.plotted}
    points = digitised.read()
    assert len(points) > 200
    assert {(point.panel, point.curve) for point in points} <= drawn
    assert all(point.start < point.end and 0 < point.mean < 1 for point in points)


def test_a_difference_has_the_paired_t_tests_interval():
    """Worked out by hand; Student's t of 3 degrees of freedom is 2.3534 at 95 %."""
    found = compare([0.71, 0.735, 0.72, 0.74], [0.70, 0.73, 0.725, 0.728], 0.05)
    differences = [0.01, 0.005, -0.005, 0.012]
    mean, half = 0.0055, 2.3534 * statistics.stdev(differences) / 4 ** 0.5
    assert found.difference == pytest.approx(mean)
    assert (found.low, found.high) == pytest.approx((mean - half, mean + half), rel=1e-4)
    again = compare([0.7, 0.8], [0.7, 0.8], 0.05)
    assert (again.low, again.high, again.verdict) == (0.0, 0.0, "same")


@pytest.mark.parametrize("shift, spread, margin, verdict", [
    (0.0, 0.001, 0.01, "same"), (0.004, 0.001, 0.01, "same"), (-0.02, 0.001, 0.01, "lower"),
    (0.02, 0.001, 0.01, "higher"), (0.0, 0.03, 0.01, "undecided"), (-0.009, 0.002, 0.01, "lower"),
])
def test_verdicts(shift, spread, margin, verdict):
    reference = [0.7, 0.75, 0.72, 0.71, 0.73]
    ours = [r + shift + spread * e for r, e in zip(reference, (-1, 1, 0, 1, -1), strict=True)]
    assert compare(ours, reference, margin).verdict == verdict


def test_same_is_said_wrongly_at_most_one_time_in_twenty():
    """Of curves that differ by just the margin, the two one-sided tests pass 5 %."""
    random, margin, trials = np.random.default_rng(0), 1.0, 1000
    said = sum(
        compare(list(margin + random.normal(0, 0.3, 5)), [0.0] * 5, margin).verdict
        == "same" for _ in range(trials))
    assert said / trials < 0.05 + 3 * (0.05 * 0.95 / trials) ** 0.5


def test_one_more_run_lies_inside_ours_in_19_of_20_cases():
    random, trials = np.random.default_rng(1), 1000
    inside = sum(verdicts.inside(list(random.normal(0, 1, 5)), [random.normal()])
                 for _ in range(trials))
    assert inside / trials == pytest.approx(0.95, abs=3 * (0.05 * 0.95 / trials) ** 0.5)


def test_one_seed_gives_no_verdict():
    assert compare([0.7], [0.7], 0.1) is None
    assert verdicts.inside([0.7], [0.7]) is None
    with pytest.raises(ValueError, match="2 runs cannot be paired with 3"):
        compare([0.1, 0.2], [0.1, 0.2, 0.3], 0.1)


def test_progress_is_that_of_an_accumulator_that_fills():
    """The sum of m^k over updates is A_k = (1 - m^k)/(1 - m) times a constant gradient."""
    momentum, updates_an_epoch = 0.99, 16
    updates = np.arange(1, 1 + 40 * updates_an_epoch)
    moved = np.cumsum(1 - momentum ** updates) / updates_an_epoch  # in epochs of a filled one
    tau = 1 / (1 - momentum) / updates_an_epoch
    np.testing.assert_allclose(
        lost_epochs.progress(updates / updates_an_epoch, tau), moved,
        atol=1 / updates_an_epoch)
    assert updates[-1] / updates_an_epoch - moved[-1] == pytest.approx(tau, rel=0.02)


@pytest.mark.parametrize("tau", [0.15, 0.8, 3.0, 12.0])
def test_lost_epochs_are_found_in_noisy_losses(tau):
    random, at = np.random.default_rng(0), np.linspace(4, 8, 20)

    def losses(tau, often):
        epochs = np.arange(1, 1 + 20 * often) / often
        loss = 1.2 + 1.1 * np.exp(-lost_epochs.progress(epochs, tau) / 6)
        return epochs, loss + random.normal(0, 0.05, len(loss))

    found = lost_epochs.equivalent_epochs(*losses(tau, 40), *losses(0.03, 80), 0.03, at)
    assert (at - found).mean() == pytest.approx(
        (at - lost_epochs.progress(at, tau)).mean(), rel=0.05, abs=0.2)


def test_the_papers_claims_are_about_a_first_curve_that_is_there():
    for names, claim in ((["decay", "hybrid"], "same"), (["hybrid"], "")):
        (figure,) = selection.only(selection.select("3a", "paper"), names)
        assert [curve.config for curve in figure.panels[0].curves] == names
        assert figure.panels[0].curves[-1].claim == claim
