"""The rules of exchange: a run of large batches is one of small batches, but for the step's size.

A noisy quadratic is trained twice, with equal examples in equal order: by batches of B, and by
batches of kappa B under converted rates. In the limit of small steps, both follow one stochastic
differential equation, to first order of the time h that an update of a small batch is (for Adam:
Malladi, Lyu, Panigrahi and Arora, "On the SDEs and Scaling Rules for Adaptive Gradient Algorithms",
NeurIPS 2022, arXiv 2205.10287; for momentum it is the underdamped Langevin equation). So the
difference of their moments falls in proportion to h. It stays, if only one rate is left as it was.

For there to be such a limit, all that acts once an update must act in proportion to h:
- Adam: eps = sqrt(h), so that steps of the size eps diffuse; 1 - beta1, 1 - beta2 and eps lambda in
  proportion to h; and the noise of a gradient to 1/sqrt(h), so that it dominates.
- Momentum: 1 - m and eps lambda in proportion to h, and eps to h**2, since A <- m A + g adds up
  1/(1 - m) gradients; the noise to 1/sqrt(h) again.

The noise of a large batch is the mean of those of its small ones. So both runs hang together, and
their difference is far less random than either. Adam begins with an average of squares as it is
under the noise that a run of this batch has, and not with 0: its first few updates divide by the
root of very few squares, whose scatter adds h log(1/h) to the difference, and hides the order.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bigbatch.config import base_config
from bigbatch.schedule import PerExample, Rates, Recipe, rates_at
from bigbatch.update.optimizer import make_optimizer

KAPPA, STEPS = 4, (1 / 24, 1 / 48, 1 / 96, 1 / 192)  # h, in units of time
TIME, PAIRS = 1.5, 20_000  # the length of a run, and the pairs of its repetitions
AGE = 1.0  # the time for which Adam has averaged squares at the start
FIELDS = ("learning_rate", "momentum", "beta2", "weight_decay")


def converted(name: str, rates: Rates, kappa: int, batch_before: int | None = None) -> Rates:
    """The rates of batches that are `kappa` times as large, as a run takes them."""
    adam = name == "adam"
    recipe = Recipe(
        rates.learning_rate, 1, rates.momentum, examples=10**6, epochs=1, beta2=rates.beta2,
        weight_decay=rates.weight_decay, exchange="sqrt" if adam else "linear",
        accumulates=not adam, per_example=PerExample(momentum=True))
    return rates_at(recipe, kappa, 0, batch_before)


def reference(name: str, h: float) -> Rates:
    """The rates of the small batches, of which an update takes the time h."""
    rate = h**0.5 if name == "adam" else 4 * h**2
    return Rates(rate, 1 - 2 * h, 1 - 3 * h, 0.5 * h / rate, 0.0, 1 - 2 * h)


@cache
def differences(name: str) -> dict[str, np.ndarray]:
    """How far the moments at the end of a run of large batches are from those of small batches.

    Returns:
        For the converted rates ("") and for these with one field left as it was (its name), one
        number for each of `STEPS`.
    """
    jax.config.update("jax_enable_x64", True)
    config = base_config()
    config.optimizer.update({"name": name, "decoupled": True, "epsilon": 1e-12})
    moments_of = jax.jit(partial(_moments, config))
    found: dict[str, list[float]] = {}
    for h in STEPS:
        small = reference(name, h)
        large = converted(name, small, KAPPA)
        variants = {"": large} | {
            field: large._replace(**{field: getattr(small, field)}) for field in FIELDS}
        moments, others = moments_of(
            h, round(TIME / (KAPPA * h)), small,
            Rates(*map(np.array, zip(*variants.values(), strict=True))))
        for field, other in zip(variants, others, strict=True):
            found.setdefault(field, []).append(float(np.linalg.norm(other - moments)))
    return {field: np.array(errors) for field, errors in found.items()}


def _moments(config, h, updates, small: Rates, large: Rates) -> tuple[jax.Array, jax.Array]:
    """E[w] and E[w**2] at the end of a run of small batches, and of runs of large ones.

    Args:
        config: names the optimizer.
        h: the time of a small batch.
        updates: of a run of large batches.
        small: the rates of small batches.
        large: those of the runs of large batches, each field with one number a run.
    """
    def step(rates, state, noise):
        params, kept = state
        optimizer = make_optimizer(config, {"w": False}, rates)
        steps, kept = optimizer.update({"w": params["w"] + noise}, kept, params)
        return {"w": params["w"] + steps["w"]}, kept

    def large_batch(number, states):
        """KAPPA small updates, and one large one of every run."""
        keys = jax.random.split(jax.random.fold_in(jax.random.key(0), number), KAPPA)
        # The noise falls over the run, or it would not matter over how long Adam averages it.
        level = jnp.exp(-number * KAPPA * h) / h**0.5
        half = level * jax.vmap(partial(jax.random.normal, shape=(PAIRS,)))(keys)
        noises = jnp.concatenate([half, -half], axis=1)  # each with its mirror image
        one, others = states
        for noise in noises:
            one = step(small, one, noise)
        return one, jax.vmap(step, (0, 0, None))(large, others, noises.mean(axis=0))

    def start(rates, size):
        params = {"w": jnp.ones(2 * PAIRS)}
        kept = make_optimizer(config, {"w": False}, rates).init(params)
        if config.optimizer.name == "adam":
            count = jnp.round(AGE / (size * h)).astype(jnp.int32)
            square = jnp.full_like(params["w"], (1 - rates.beta2**count) / (size * h))
            kept = optax.tree_utils.tree_set(
                kept, count=count, nu={"w": square}, mu_weight=1 - rates.momentum**count,
                nu_weight=1 - rates.beta2**count)
        return params, kept

    one, others = start(small, 1), jax.vmap(start, (0, None))(large, KAPPA)
    (one, _), (others, _) = jax.lax.fori_loop(0, updates, large_batch, (one, others))
    return tuple(jnp.stack([w.mean(axis=-1), (w**2).mean(axis=-1)], axis=-1)
                 for w in (one["w"], others["w"]))


def slope(errors: np.ndarray) -> float:
    """The exponent of h with which the errors fall, by least squares."""
    return float(np.polyfit(np.log(STEPS), np.log(errors), 1)[0])


@pytest.mark.parametrize("name", ["adam", "momentum"])
def test_under_converted_rates_the_difference_falls_with_the_step(name):
    errors = differences(name)[""]
    assert 0.8 < slope(errors) < 1.3, errors


@pytest.mark.parametrize(("name", "field"), [
    *(("adam", field) for field in FIELDS),
    *(("momentum", field) for field in FIELDS if field != "beta2"),
])
def test_with_one_rate_left_as_it_was_it_stays(name, field):
    errors = differences(name)[field]
    assert slope(errors) < 0.5, errors
    assert errors[-1] > 3 * differences(name)[""][-1]


@pytest.mark.parametrize("rescaled", [True, False])
def test_where_the_batch_grows_under_way_the_accumulator_needs_its_new_unit(rescaled):
    """A grows to 1/(1-m) gradients, so under m**kappa what it holds is too much by this ratio.

    The first update after the change can take that away, if it leaves m**kappa (1-m)/(1-m**kappa)
    of A in the place of m**kappa. Otherwise the weights are pushed on further than they would have
    gone. The mean of the weights is exact: noise has no part in it.
    """
    def after(weights, accumulated, rates, updates, first):
        for left in [first] + [rates.momentum] * (updates - 1):
            accumulated = left * accumulated + weights
            weights -= rates.learning_rate * accumulated
        return weights, accumulated

    errors = []
    for h in STEPS:
        small = reference("momentum", h)
        large = converted("momentum", small, KAPPA)
        halves = round(0.5 / h), round(1 / h)
        begun = after(1.0, 0.0, small, halves[0], small.momentum)
        first = converted("momentum", small, KAPPA, batch_before=1 if rescaled else None)
        expected, _ = after(*begun, small, halves[1], small.momentum)
        found, _ = after(*begun, large, halves[1] // KAPPA, first.momentum)
        errors.append(abs(found - expected))
    assert (0.8 < slope(np.array(errors)) < 1.3) == rescaled, errors
    assert (errors[-1] < 0.01) == rescaled
