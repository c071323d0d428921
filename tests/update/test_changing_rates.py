"""Optimizers whose rates change with the batch, against closed forms and sums written out."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bigbatch import schedule
from bigbatch.config import make_phases, make_recipe
from bigbatch.storage import checkpoint, writing
from bigbatch.update.adam import scale_by_adam
from bigbatch.update.optimizer import init_optimizer, make_optimizer
from tests.support.configs import load

IN_NORM = {"w": False}
# Growth early on, and a batch that becomes smaller again as behind the stretch of a branch.
COURSES = (
    "ramp,ramp=((1.0,2.0),)",
    "by_hand,by_hand=((1.0,128),(20.0,16)),recipe.falls=()",
)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("course", COURSES)
@pytest.mark.parametrize("name", ["adam_by_sqrt", "momentum", "nesterov"])
def test_under_a_constant_gradient_a_change_of_the_batch_changes_nothing(name, course):
    """Adam's step is the rate, from the first update on. Where gradients are added up, the step of
    an example is what the examples so far have filled the accumulator to, whatever the batches."""
    adam = name == "adam_by_sqrt"
    config = load("digits", f"{course},optimizer={name}" if adam else (
        f"{course},optimizer.name={name},per_example.momentum=True"))
    config.optimizer.weight_decay, config.per_example.beta2_floor = 0.0, 0.5
    recipe, phases = make_recipe(config), make_phases(config)
    assert len({phase.batch_size for phase in phases}) > 1
    ones, zeros = {"w": jnp.ones(1)}, {"w": jnp.zeros(1)}
    take = jax.jit(lambda rates, state: make_optimizer(config, IN_NORM, rates).update(
        ones, state, zeros))
    state = init_optimizer(config, IN_NORM, zeros)
    for start, end in schedule.spans(phases, 0):
        phase = schedule.phase_at(phases, start)
        rates = schedule.take_rates(recipe, phases, phase, start, end)
        step, state = take(jax.tree.map(jnp.float64, rates), state)
        went = -float(step["w"][0])
        if adam:
            assert went == pytest.approx(rates.learning_rate, rel=1e-6), start
            continue
        counted = end + (end - start) * (name == "nesterov")  # it looks an update ahead
        filled = (1 - recipe.momentum ** (counted / recipe.batch_size)) / (1 - recipe.momentum)
        wanted = schedule.reference_rate(recipe, start) * filled / recipe.batch_size
        assert went / (end - start) == pytest.approx(wanted, rel=1e-9), start


def test_with_betas_that_stay_it_is_optaxs():
    ours, theirs = (of(0.9, 0.99, 1e-6) for of in (scale_by_adam, optax.scale_by_adam))
    update, expect = jax.jit(ours.update), jax.jit(theirs.update)
    params = {"w": jnp.zeros((3, 2)), "b": jnp.zeros(2)}
    state, other = ours.init(params), theirs.init(params)
    for key in jax.random.split(jax.random.key(0), 30):
        gradient = {"w": jax.random.normal(key, (3, 2)), "b": jax.random.normal(key, 2)}
        steps, state = update(gradient, state)
        expected, other = expect(gradient, other)
        for name in params:
            np.testing.assert_allclose(steps[name], expected[name], rtol=1e-11)


def test_averages_are_means_by_the_weights_that_all_betas_leave():
    """Every gradient weighs 1-beta of its update times the betas of all later ones."""
    rng = np.random.default_rng(0)
    gradients, b1, b2 = rng.normal(size=40), rng.uniform(0.3, 0.95, 40), rng.uniform(0.9, 0.999, 40)
    state = scale_by_adam(0.0, 0.0).init({"w": jnp.zeros(())})
    for last in range(40):
        step, state = scale_by_adam(b1[last], b2[last], 0.0).update(
            {"w": jnp.float64(gradients[last])}, state)
        first, second = (np.average(gradients[: last + 1] ** power, weights=[
            (1 - beta[at]) * np.prod(beta[at + 1: last + 1]) for at in range(last + 1)])
            for power, beta in ((1, b1), (2, b2)))
        assert float(step["w"]) == pytest.approx(first / np.sqrt(second), rel=1e-10)


@pytest.mark.parametrize(("adam", "follows"), [(scale_by_adam, True), (optax.scale_by_adam, False)])
def test_after_an_early_growth_adam_goes_as_far_as_with_small_batches(adam, follows):
    """The difference falls with the step's size, as the rules of exchange have it, though nothing
    has filled the averages yet when the batch grows; under Optax's correction it stays."""
    def after(weights, state, updates, size, h):
        optimizer = adam((1 - 2 * h) ** size, (1 - 3 * h) ** size, 1e-12)

        def update(_, carried):
            weights, state = carried
            step, state = optimizer.update(weights, state)
            return weights - h * size * step, state  # a rate in proportion: nothing is noise here

        return jax.lax.fori_loop(0, updates, update, (weights, state))

    errors, sizes = [], np.array([1 / 24, 1 / 48, 1 / 96, 1 / 192])
    for h in sizes:
        start = jnp.ones(()), adam(0.0, 0.0).init(jnp.zeros(()))
        quarter = round(0.25 / h)
        begun = after(*start, quarter, 1, h)
        expected, _ = after(*begun, 2 * quarter, 1, h)
        found, _ = after(*begun, quarter // 2, 4, h)
        errors.append(abs(float(found - expected)))
    slope = np.polyfit(np.log(sizes), np.log(errors), 1)[0]
    assert (0.7 < slope < 1.5) == follows, errors
    assert (errors[-1] < 0.01) == follows, errors


def test_a_state_of_an_older_version_goes_on_as_that_version_would(tmp_path):
    """It had Optax's state, without the weights."""
    params = {"w": jnp.zeros(2)}
    theirs = optax.scale_by_adam(0.9, 0.99)
    old = theirs.init(params)
    for number in range(5):
        _, old = theirs.update({"w": jnp.array([1.0, number])}, old)
    run = {"examples_seen": 5, "updates": 5}
    writing.save(tmp_path, {"opt_state": [old]}, run, 1, set()).result()
    ours = scale_by_adam(0.9, 0.99)
    like = {"opt_state": [jax.eval_shape(ours.init, params)]}
    read = checkpoint.restore(checkpoint.find_newest(tmp_path).path, like)["opt_state"][0]
    gradient = {"w": jnp.array([-1.0, 2.0])}
    steps, new = ours.update(gradient, jax.tree.map(jnp.asarray, read))
    expected, _ = theirs.update(gradient, old)
    np.testing.assert_allclose(steps["w"], expected["w"], rtol=1e-11)
    assert float(new.mu_weight) == pytest.approx(1 - 0.9**6)
