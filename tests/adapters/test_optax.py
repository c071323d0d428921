"""A table in an Optax loop: `MultiSteps` adds up micro-batches, stopped at any of them."""

import pytest

jax = pytest.importorskip("jax", reason="jax is not installed")
optax = pytest.importorskip("optax", reason="optax is not installed")
ocp = pytest.importorskip("orbax.checkpoint", reason="orbax is not installed")

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from bigbatch import schedule  # noqa: E402
from bigbatch.adapters.optax import every_k, position, rate_schedules  # noqa: E402
from bigbatch.mistake import Mistake  # noqa: E402
from bigbatch.schedule.order import records  # noqa: E402
from bigbatch.update.adam import scale_by_adam  # noqa: E402
from tests.adapters import tables  # noqa: E402
from tests.adapters.tables import EXAMPLES, FEATURES, MICRO_BATCH, TABLES, TARGETS, Taken  # noqa: E402


def adamw(learning_rate, b1, b2, weight_decay):
    return optax.chain(scale_by_adam(b1, b2), optax.add_decayed_weights(weight_decay),
                       optax.scale_by_learning_rate(learning_rate))


def make_optimizer(table):
    """As a user writes it."""
    rates = rate_schedules(table)
    if table.recipe.accumulates:
        inner = optax.inject_hyperparams(optax.sgd)(
            learning_rate=rates.learning_rate, momentum=rates.momentum)
    else:
        inner = optax.inject_hyperparams(adamw)(
            learning_rate=rates.learning_rate, b1=rates.momentum, b2=rates.beta2,
            weight_decay=rates.weight_decay)
    return optax.MultiSteps(
        inner, every_k_schedule=every_k(table, MICRO_BATCH), accumulator_dtype=jnp.float64)


def make_step(optimizer):
    @jax.jit
    def step(weights, state, features, targets):
        def loss(weights):
            return jnp.mean((features @ weights - targets) ** 2)

        changes, state = optimizer.update(jax.grad(loss)(weights), state, weights)
        return optax.apply_updates(weights, changes), state

    return step


def in_optimizer(table, state):
    """The rates of the last update."""
    used = state.inner_opt_state.hyperparams
    names = ["learning_rate", "momentum"] if table.recipe.accumulates else [
        "learning_rate", "b1", "b2", "weight_decay"]
    return tuple(float(used[name]) for name in names)


def train(table, taken, seen, saved=None, micro_batches=None):
    """A loop of `micro_batches` calls of the optimizer, or to the end; returns what one saves."""
    optimizer = make_optimizer(table)
    step = make_step(optimizer)
    weights = jnp.zeros(3)
    weights, state = (weights, optimizer.init(weights)) if saved is None else saved
    example = position(table, MICRO_BATCH, int(state.gradient_step), int(state.mini_step))
    starts = range(example, table.examples, MICRO_BATCH)[:micro_batches]
    for start in starts:
        rows = records(3, start, MICRO_BATCH, EXAMPLES)[:, 0]
        seen += map(int, rows)
        weights, state = step(weights, state, FEATURES[rows], TARGETS[rows])
        if optimizer.has_updated(state):
            taken.append(Taken(tuple(seen), in_optimizer(table, state)))
            seen.clear()
    assert step._cache_size() == 1  # a change of the batch compiles nothing
    return weights, state


@pytest.mark.parametrize("name", TABLES)
def test_a_loop_stopped_anywhere_and_continued_consumes_the_table(name, tmp_path):
    jax.config.update("jax_enable_x64", True)
    table = TABLES[name]
    within_an_update = schedule.row(table, table.phases[2].start_update + 2).start // 2 + 1
    for stop in (10, within_an_update):
        taken, seen = [], []
        saved = train(table, taken, seen, micro_batches=stop)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / f"{stop}", saved)
            checkpointer.wait_until_finished()
            saved = checkpointer.restore(tmp_path / f"{stop}", jax.tree.map(jnp.zeros_like, saved))
        weights, state = train(table, taken, seen, saved)
        assert taken == tables.wanted(table) and not seen
        assert int(state.gradient_step) == table.updates
        np.testing.assert_allclose(weights, tables.weights_after(table, taken), rtol=1e-11)


def test_in_float32_the_rates_are_rounded_and_the_batches_are_the_same():
    table = TABLES["adam"]
    rates, accumulations = rate_schedules(table), every_k(table, MICRO_BATCH)
    for row in schedule.rows(table):
        found = [by_update(row.update) for by_update in rates]
        np.testing.assert_array_equal(found, np.float32(row.rates))
        assert accumulations(row.update) * MICRO_BATCH == row.batch_size


def test_a_batch_that_is_no_whole_number_of_micro_batches_is_refused():
    with pytest.raises(Mistake, match="no multiple of the micro-batch of 3"):
        every_k(TABLES["adam"], 3)
