"""Two tables, a task, and what each update of them must do to its weights, in plain NumPy."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from bigbatch import schedule
from bigbatch.schedule import Limits, PerExample, Recipe, Strategy, Table
from bigbatch.schedule.order import permutation

EXAMPLES = 50  # no multiple of a larger batch, so updates lie in two epochs
MICRO_BATCH = 2
LIMITS = Limits(max_batch_size=16, granularity=MICRO_BATCH)
ORDER = partial(permutation, 3, examples=EXAMPLES)
# Everything that a rate can do: a warm-up, a smooth curve, both betas and the decay per example.
ADAM = Recipe(
    learning_rate=0.02, batch_size=4, momentum=0.9, beta2=0.99, weight_decay=0.1,
    examples=EXAMPLES, epochs=6, warmup_epochs=0.5, curve="cosine", exchange="sqrt",
    accumulates=False, per_example=PerExample(momentum=True))
# A ramp, then falls; the accumulator is carried over in the first update of a phase, where the
# momentum changes.
SGD = Recipe(
    learning_rate=0.02, batch_size=4, momentum=0.9, examples=EXAMPLES, epochs=6,
    falls=((2, 2), (4, 2)), per_example=PerExample(momentum=True))
TABLES = {
    "adam": schedule.make_table(ADAM, "increase", LIMITS),
    "sgd": schedule.make_table(SGD, Strategy("increase", ramp=((0.5, 2),)), LIMITS),
}
FEATURES = np.random.default_rng(0).normal(size=(EXAMPLES, 3))
TARGETS = FEATURES @ [1.0, -2.0, 0.5] + np.random.default_rng(1).normal(size=EXAMPLES)


class Taken(NamedTuple):
    """What one update took, as a loop has recorded it."""

    examples: tuple[int, ...]
    rates: tuple[float, ...]  # rate, momentum or both betas, and the decay where it is decoupled


def wanted(table: Table, from_update: int = 0) -> list[Taken]:
    """What the updates of a table take, read off a long list of all epochs' orders."""
    positions = np.concatenate([ORDER(epoch) for epoch in range(8)])
    adam = not table.recipe.accumulates
    found = []
    for row in schedule.rows(table, schedule.row(table, from_update).start):
        examples = positions[row.start : row.start + row.batch_size]
        rates = row.rates[:4] if adam else row.rates[:2]
        found.append(Taken(tuple(map(int, examples)), tuple(rates)))
    return found


def stops(table: Table) -> Iterator[int]:
    """Updates after which to stop: in the midst of each phase, and where one ends."""
    for phase in table.phases:
        yield phase.start_update + max(phase.updates // 2, 1)
    yield table.phases[1].start_update


def weights_after(table: Table, taken: Sequence[Taken]) -> np.ndarray:
    """The weights that mean squared error over each update's examples leads to, from zeros."""
    weights, first, second = np.zeros(3), np.zeros(3), np.zeros(3)
    begun1, begun2 = 1.0, 1.0  # what all updates together have left of Adam's zeros
    for examples, rates in taken:
        features = FEATURES[list(examples)]
        gradient = 2 * features.T @ (features @ weights - TARGETS[list(examples)]) / len(examples)
        if table.recipe.accumulates:
            rate, momentum = rates
            first = momentum * first + gradient
            weights = weights - rate * first
        else:
            rate, beta1, beta2, decay = rates
            first = beta1 * first + (1 - beta1) * gradient
            second = beta2 * second + (1 - beta2) * gradient**2
            begun1, begun2 = beta1 * begun1, beta2 * begun2
            step = first / (1 - begun1) / (np.sqrt(second / (1 - begun2)) + 1e-8)
            weights = weights - rate * (step + decay * weights)
    return weights
