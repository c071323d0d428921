"""The measured noise scale along runs, from made-up measurements whose true scale is known."""

import numpy as np
import pytest

from experiments import figures, noise
from experiments.logs import Logs

SQUARE, TRACE = 0.5, 1500.0  # |G|^2 and the covariance's trace: a scale of 3,000 examples


def made_up(random, measurements, error, batch=10, name="noise_full"):
    """A finished run of one batch and one rate that was measured so often, with so large an error
    of |G|^2 at each: estimates without bias, some of them below 0."""
    return Logs([
        {"examples_seen": batch * at, "batch_size": batch, "learning_rate": 0.1,
         f"{name}_gradient_square": random.normal(SQUARE, error),
         f"{name}_trace": random.normal(TRACE, TRACE / 10)}
        for at in range(1, measurements + 1)
    ], [], {"data": {"train_examples": 100, "dir": ""}}, [
        {"start_example": 0, "end_example": batch * measurements, "updates": measurements,
         "batch_size": batch, "learning_rate": 0.1, "learning_rate_end": 0.1}], "")


@pytest.mark.parametrize("error, known", [(0.1, (1.0, 1.0)), (1.2, (0.4, 0.8)), (9.0, (0.0, 0.2))])
def test_an_interval_of_two_standard_errors_has_the_true_scale_in_19_of_20_cases(error, known):
    """Also where |G|^2 is lost in its error, and only a lower end is known."""
    random, trials = np.random.default_rng(0), 400
    found = [noise.pooled([made_up(random, 30, error)], "noise_full", 0, 300)
             for _ in range(trials)]
    inside = [scale.low <= TRACE / SQUARE <= scale.high for scale in found
              if not np.isnan(scale.low)]
    assert len(inside) > 0.8 * trials
    assert np.mean(inside) == pytest.approx(0.95, abs=0.04)
    told = [scale for scale in found if np.isfinite(scale.value)]
    assert known[0] <= len(told) / trials <= known[1]
    assert all(0 < scale.low < scale.value < scale.high < np.inf for scale in told)


def test_a_rows_scale_is_that_of_all_its_measurements_and_not_of_stretches_that_are_known():
    """Of three runs, most stretches of which alone tell no scale, or one that is far too low."""
    random = np.random.default_rng(1)
    panel = figures.FIGURES["noise"].panels[0]
    results = {curve.config: [made_up(random, 40, 1.5) for _ in range(3)]
               for curve in panel.curves}
    (table,) = noise.tables(figures.FIGURES["noise"]._replace(panels=(panel,)), "small", results)
    for curve, cells in zip(panel.curves, table.cells, strict=True):
        runs = results[curve.config]
        alone = [noise.pooled([run], "noise_full", s.start, s.end).value
                 for run in runs for s in noise.stretches(run)]
        survivors = [scale for scale in alone if np.isfinite(scale)]
        assert len(survivors) < 15 < len(alone) and np.mean(survivors) < 0.7 * TRACE / SQUARE
        square, trace = (
            np.mean([event[f"noise_full_{part}"] for run in runs for event in run.events])
            for part in ("gradient_square", "trace"))
        row = dict(zip(table.header, cells, strict=True))
        assert row["n"] == "120" and row["by the norms / full"] == "not known"
        value, interval = row["measured noise scale"].replace(",", "").split(" (")
        assert float(value) == pytest.approx(trace / square, rel=0.01)
        low, high = map(float, interval.rstrip(")").split(" to "))
        assert low < TRACE / SQUARE < high
        assert float(row["batch / scale"]) == pytest.approx(10 * square / trace, rel=0.01)


def test_stretches_end_where_phases_do():
    """A tenth of the run or so; each with its batch."""
    run = made_up(np.random.default_rng(0), 100, 1.0)
    (phase,) = run.phases
    cut = run._replace(phases=[phase | {"end_example": 330},
                               phase | {"start_example": 330, "end_example": 350, "batch_size": 20},
                               phase | {"start_example": 350, "batch_size": 50}])
    found = noise.stretches(cut)
    assert [(stretch.start, stretch.end, stretch.batch) for stretch in found] == [
        (0, 110, 10), (110, 220, 10), (220, 330, 10), (330, 350, 20), (350, 458, 50),
        (458, 566, 50), (566, 675, 50), (675, 783, 50), (783, 891, 50), (891, 1000, 50)]
