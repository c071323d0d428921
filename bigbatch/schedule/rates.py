"""The one formula: what an update of any batch takes from the reference that a recipe states.

A recipe states a batch B_ref and a learning rate eta(e) over the examples e. An update of B
examples that begins at e has the rate

    eps = eta(e) (B/B_ref)^p        p = 1: "linear", p = 1/2: "sqrt", p = 0: "none"

"linear" is the rule of SGD with and without momentum (Smith, Kindermans, Ying, Le, ICLR 2018),
"sqrt" that of Adam (Malladi et al., 2022), and "none" leaves the rate alone. So the noise
eps^(1/p)/B is that of the reference at every update, whatever the batches are. What is stated per
example (`PerExample`) is converted with the same kappa = B/B_ref. No other code computes a rate.
"""

import math
from typing import NamedTuple

from bigbatch.schedule import curves
from bigbatch.schedule.recipe import Recipe, exchange_power, keeps_beta2, keeps_momentum

TOLERANCE = 1e-9  # of the noise of an update


class Rates(NamedTuple):
    """The numbers of one update that may differ from update to update.

    They are inputs of the compiled update, so a new value needs no compilation.
    """

    learning_rate: float  # eps
    # What an update leaves of the accumulator, which after a change of the batch it also carries
    # over (`rates_at`); for Adam its first beta.
    momentum: float
    beta2: float  # what an update leaves of Adam's average of squared gradients
    weight_decay: float  # decoupled: an update shrinks the weights by learning_rate x this
    average: float  # what an update leaves of the average of the weights (`config.ema`)
    # What Nesterov's step adds of the accumulator: the momentum, without what carries it over.
    look_ahead: float


class NoiseDiffers(ArithmeticError):
    """An update would not have the noise that its recipe states: a fault of this package."""


def share(recipe: Recipe, example: int) -> float:
    """What is left of the peak of the reference's rate after a warm-up, in [0, 1]; 1 during it."""
    if recipe.curve == "steps":
        return 1.0 / _divided(recipe, example)
    first, last = warmup_end(recipe), round(recipe.epochs * recipe.examples)
    progress = min(max((example - first) / (last - first), 0.0), 1.0)
    return min(max(shape_of(recipe)(progress), 0.0), 1.0)


def shape_of(recipe: Recipe) -> curves.Shape:
    """The function of a smooth curve; see `curves.make_shape`."""
    return curves.make_shape(recipe.curve, recipe.final_share, recipe.power, recipe.tail_share,
                             recipe.tail_shape)


def peak_example(recipe: Recipe) -> int:
    """The example from which a batch may grow: the end of the warm-up, or the curve's own peak."""
    first = warmup_end(recipe)
    if recipe.curve == "steps":
        return first
    last = round(recipe.epochs * recipe.examples)
    return first + round((last - first) * curves.peak(shape_of(recipe)))


def warmup_end(recipe: Recipe) -> int:
    """The example at which the warm-up ends; 0 if there is none."""
    return round(recipe.warmup_epochs * recipe.examples)


def reference_rate(recipe: Recipe, example: int) -> float:
    """eta(e): the rate of the reference, linear in the examples seen during a warm-up."""
    first = warmup_end(recipe)
    if example < first:
        start = recipe.warmup_learning_rate
        return start + example / first * (recipe.learning_rate - start)
    if recipe.curve == "steps":
        return recipe.learning_rate / _divided(recipe, example)
    return recipe.learning_rate * share(recipe, example)


def momentum_of(recipe: Recipe, batch_size: int) -> float:
    """m, or Adam's first beta, of updates of `batch_size` examples."""
    return _kept(recipe.momentum, keeps_momentum(recipe), recipe, batch_size)


def learning_rate_of(recipe: Recipe, reference: float, batch_size: int) -> float:
    """The rate of updates of `batch_size` examples where the reference's is `reference`.

    Where gradients are added up and the momentum is kept per example, the rate also makes up for
    the momentum's change, since a step grows by 1/(1-m).
    """
    kappa = batch_size / recipe.batch_size
    return reference * kappa ** exchange_power(recipe.exchange) * _made_up(recipe, batch_size)


def rates_at(
    recipe: Recipe, batch_size: int, example: int, batch_before: int | None = None
) -> Rates:
    """What the update of `batch_size` examples that begins at `example` takes.

    Args:
        recipe: see `recipe.stated`.
        batch_size: of the update.
        example: the examples seen before the update.
        batch_before: that of the update before, if it was another. Where gradients are added up,
            its accumulator holds 1/(1-m) gradients with its own m, and is carried over so that it
            holds as many as with the new one.
    """
    keep, kappa = recipe.per_example, batch_size / recipe.batch_size
    momentum = momentum_of(recipe, batch_size)
    power, made_up = exchange_power(recipe.exchange), _made_up(recipe, batch_size)
    decay = kappa ** (1.0 - power) / made_up if keep.weight_decay else 1.0
    carried = 1.0
    if recipe.accumulates and batch_before is not None:
        carried = (1.0 - momentum_of(recipe, batch_before)) / (1.0 - momentum)
    return Rates(
        learning_rate=learning_rate_of(recipe, reference_rate(recipe, example), batch_size),
        momentum=momentum * carried,
        beta2=_kept(recipe.beta2, keeps_beta2(recipe), recipe, batch_size),
        weight_decay=recipe.weight_decay * decay,
        average=_kept(recipe.average, keep.average, recipe, batch_size),
        look_ahead=momentum,
    )


def noise_scale(learning_rate: float, momentum: float, examples: int, batch_size: int) -> float:
    """The noise scale of SGD, g = eps/(1-m) (N/B - 1) (Smith et al., ICLR 2018, section 4)."""
    return learning_rate / (1.0 - momentum) * (examples / batch_size - 1.0)


def noise_scale_approximate(
    learning_rate: float, momentum: float, examples: int, batch_size: int
) -> float:
    """The noise scale for B << N, eps N / (B (1-m)), which all strategies of a recipe share."""
    return learning_rate / (1.0 - momentum) * examples / batch_size


def stated_noise(recipe: Recipe, example: int) -> float | None:
    """The noise that a recipe states, eta(e)^(1/p), relative to that at its peak.

    None with the exchange "none", which keeps no noise.
    """
    power = exchange_power(recipe.exchange)
    return (reference_rate(recipe, example) / recipe.learning_rate) ** (1.0 / power) if power else (
        None)


def noise(recipe: Recipe, learning_rate: float, batch_size: int) -> float | None:
    """The noise of an update, eps^(1/p)/B, relative to that of the reference at its peak.

    Args:
        recipe: of the run.
        learning_rate: of the update.
        batch_size: of the update.

    Returns:
        1 at the peak, below 1 after it; None with the exchange "none", which keeps no noise.
    """
    power = exchange_power(recipe.exchange)
    if not power:
        return None
    steps = learning_rate / recipe.learning_rate
    if recipe.accumulates:
        steps *= (1.0 - recipe.momentum) / (1.0 - momentum_of(recipe, batch_size))
    return steps ** (1.0 / power) * recipe.batch_size / batch_size


def check_noise(recipe: Recipe, learning_rate: float, batch_size: int, example: int) -> None:
    """Checks an update against the noise that its recipe states.

    Args:
        recipe: of the run.
        learning_rate: of the update.
        batch_size: the examples that it takes.
        example: where it begins.

    Raises:
        NoiseDiffers: if its noise (with the exchange "none" its rate) is another.
    """
    found, wanted = noise(recipe, learning_rate, batch_size), stated_noise(recipe, example)
    if found is None or wanted is None:
        found, wanted = learning_rate, _made_up(recipe, batch_size) * reference_rate(
            recipe, example)
    if abs(found - wanted) > TOLERANCE * wanted:
        raise NoiseDiffers(
            f"the update at example {example} would have {found / wanted if wanted else found:.12g}"
            f" of the noise that its recipe states, with a rate of {learning_rate:g} and a batch of"
            f" {batch_size}. Please report this."
        )


def _divided(recipe: Recipe, example: int) -> float:
    """The product of the factors of all falls so far."""
    return math.prod(
        factor for epoch, factor in recipe.falls if round(epoch * recipe.examples) <= example)


def _kept(remains: float, per_example: bool, recipe: Recipe, batch_size: int) -> float:
    """What an update of `batch_size` leaves, if one of the recipe's batch leaves `remains`."""
    return remains ** (batch_size / recipe.batch_size) if per_example else remains


def _made_up(recipe: Recipe, batch_size: int) -> float:
    """By how much the rate makes up for steps that are shorter under a lower momentum."""
    if not recipe.accumulates:
        return 1.0
    return (1.0 - momentum_of(recipe, batch_size)) / (1.0 - recipe.momentum)
