"""Up to which factor of the batch losses are as good: what is paired, and what is concluded."""

import numpy as np

from bigbatch.branching import verdicts


def losses(runs, orders, evaluations, shifts, spread, shared):
    """{factor: losses_RxOxE}: a factor's shift over noise that a run's, or order's, branches share.

    `spread` is of what differs between the branches of a pair, `shared` of what they have in
    common.
    """
    draw = np.random.default_rng(0)
    common = draw.normal(0, shared, (runs, orders, 1))
    own = {factor: draw.normal(0, spread, (runs, orders, 1)) for factor in shifts}
    return {factor: 1.0 + shift + common + own[factor] + np.zeros(evaluations)
            for factor, shift in shifts.items()}


def test_what_the_branches_of_a_run_share_is_not_in_the_interval():
    over, (first, second, third, fourth) = verdicts.of_factors(
        losses(6, 1, 4, {1: 0, 2: 0.0, 4: 0.005, 8: 0.1}, 0.002, 0.5), 0.01)
    assert over == "runs" and first.passes and first.comparison is None
    assert [one.passes for one in (second, third, fourth)] == [True, True, False]
    assert {one.pairs for one in (second, third, fourth)} == {6}
    assert fourth.comparison.low > 0.09
    assert verdicts.critical([first, second, third, fourth]) == (4, 8)
    told = verdicts.told([first, second, third, fourth], 32)
    assert told == ("The loss is as good up to a batch of 128, 4 times the run's, and worse at 256 "
                    "(8 times).")


def test_several_orders_of_one_run_are_several_pairs_and_those_of_runs_are_averaged():
    one_run = losses(1, 5, 4, {1: 0, 2: 0.0}, 0.002, 0.5)
    assert verdicts.of_factors(one_run, 0.01)[0] == "orders"
    draw = np.random.default_rng(3)
    several = {factor: np.concatenate([array] * 3) + draw.normal(0, 0.001, (3, 1, 1))
               for factor, array in one_run.items()}
    over, (_, second) = verdicts.of_factors(several, 0.01)
    assert (over, second.pairs) == ("runs", 3)  # 3 and not 15, which would not be independent


def test_one_course_of_training_is_paired_by_its_evaluations():
    draw = np.random.default_rng(1)
    course = draw.normal(1, 0.5, (1, 1, 8))
    over, (_, second, third) = verdicts.of_factors(
        {1: course, 2: course + draw.normal(0, 0.002, 8), 4: course + draw.normal(0, 0.1, 8)}, 0.01)
    assert (over, second.pairs, second.passes, third.passes) == ("evaluations", 8, True, None)
    assert verdicts.critical([second, third]) == (2, None)
    assert verdicts.told([second, third], 8).endswith("; undecided: 4 times.")


def test_a_branch_that_diverged_is_worse():
    given = losses(3, 1, 4, {1: 0, 2: 0, 4: 0}, 0.001, 0.1)
    given[4][1, 0, 2:] = np.nan
    _, found = verdicts.of_factors(given, 0.01)
    assert found[2].passes is False and found[2].comparison is None
    assert verdicts.critical(found) == (2, 4)


def test_what_is_called_as_good_is_worse_by_the_margin_in_1_of_20_at_most():
    """At the margin itself the test's size is 5 %; 300 draws have a standard error of 1.3 %."""
    draw = np.random.default_rng(2)
    passed = 0
    for _ in range(300):
        shared = draw.normal(size=(5, 1, 1))
        branch = shared + 0.01 + draw.normal(0, 0.003, (5, 1, 1))
        passed += verdicts.of_factors({1: shared, 2: branch}, 0.01)[1][1].passes is True
    assert 0.01 < passed / 300 < 0.09
