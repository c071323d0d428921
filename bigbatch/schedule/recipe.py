"""What a run is asked for: the reference recipe, the limits on its batches, and their checks.

A recipe states a reference: a batch size B_ref and a learning rate eta(e) over the examples e. See
`rates` for what follows from it under another batch. Pure Python; of the package only `mistake` is
imported.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from bigbatch.mistake import Mistake
from bigbatch.schedule import curves

STRATEGIES = ("constant", "decay", "hybrid", "increase", "by_hand", "measured")
# The power p of the batch by which the rate is multiplied; see `rates`.
EXCHANGES: Mapping[str, float] = {"linear": 1.0, "sqrt": 0.5, "none": 0.0}
MOST_EXAMPLES = 2**53  # whole numbers that a float holds
LARGEST_GROWTH = 1e6
GROWTH = 2.0  # between two batches of a smooth curve, where limits.growth does not say


@dataclasses.dataclass(frozen=True)
class PerExample:
    """What keeps its effect per example, and not per update, when the batch changes.

    A coefficient b that remains of an average after an update of B_ref examples becomes
    b^(B/B_ref) in an update of B, so that as much remains after the same examples.
    """

    # m, or Adam's first beta. None: where the optimizer averages gradients, as Adam does.
    momentum: bool | None = None
    beta2: bool = True  # where the optimizer averages gradients
    weight_decay: bool = True  # where it is decoupled
    average: bool = True  # of the weights
    momentum_floor: float = 0.0  # a schedule that takes the momentum below this is refused
    beta2_floor: float = 0.9


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The hyperparameters of a run that do not depend on the strategy: those of the reference."""

    learning_rate: float  # the peak of eta, which a warm-up rises to
    batch_size: int  # B_ref, examples in an update
    momentum: float  # m; for Adam its first beta
    examples: int  # N, examples in the training set
    epochs: float
    falls: tuple[tuple[float, float], ...] = ()  # (epoch, factor that divides eta), of "steps"
    warmup_epochs: float = 0.0
    warmup_learning_rate: float = 0.0  # the rate (not a factor) at which the linear warm-up starts
    curve: str | curves.Shape = "steps"  # see `curves.make_shape`, also for the next four
    final_share: float = 0.0
    power: float = 1.0
    tail_share: float = 0.2
    tail_shape: str = "linear"
    exchange: str = "linear"  # one of EXCHANGES
    beta2: float = 0.999  # Adam's
    weight_decay: float = 0.0
    average: float = 0.0  # what an update of B_ref examples leaves of the average of the weights
    # Whether the optimizer adds gradients up (A <- m A + g), so that its steps grow by 1/(1-m), and
    # does not average them, as Adam does.
    accumulates: bool = True
    per_example: PerExample = PerExample()


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bounds on the batch sizes of a schedule."""

    max_batch_size: int | None = None  # None: no limit
    granularity: int | None = None  # batch sizes are multiples of this; None: of ghost_size
    ghost_size: int = 1  # examples in a ghost batch
    # The smallest factor by which a strategy makes a batch grow at once. None: GROWTH under a
    # smooth curve, and any factor at the falls of "steps".
    growth: float | None = None


def scale_up(recipe: Recipe, learning_rate_factor: float = 1.0, momentum: float | None = None,
             granularity: int = 1) -> Recipe:
    """The recipe with another learning rate and momentum, and a batch in proportion to eps/(1-m).

    The noise scale stays the same, and a larger rate or momentum needs fewer updates (Smith et al.,
    ICLR 2018, section 5.2). Where the exchange is "sqrt", the batch grows by the square of the
    rate's factor. To be called before training. The rate at which a warm-up starts is not scaled.

    Args:
        recipe: the recipe to scale.
        learning_rate_factor: multiplies the rate.
        momentum: the new momentum coefficient; None keeps the recipe's.
        granularity: the new batch size must be a multiple of this.

    Raises:
        Mistake: if the factor or a momentum is out of its range, or if the batch that keeps the
            noise scale is not a multiple of `granularity` or is larger than the training set.
    """
    new_momentum = recipe.momentum if momentum is None else momentum
    _check_momentum("recipe.momentum", recipe.momentum)
    _check_momentum("scale_up.momentum", new_momentum)
    if not 0 < learning_rate_factor <= LARGEST_GROWTH:
        raise Mistake(
            f"scale_up.learning_rate is {learning_rate_factor}; it is a factor on the rate and "
            f"must be over 0 and at most {LARGEST_GROWTH:g} (1 leaves the rate as it is)."
        )
    power = exchange_power(recipe.exchange)
    if not power:
        raise Mistake(
            "scale_up grows the batch with the rate, but the exchange 'none' leaves the rate alone "
            "whatever the batch; set the exchange to linear or sqrt, or leave scale_up out."
        )
    step_factor = learning_rate_factor * (1.0 - recipe.momentum) / (1.0 - new_momentum)
    batch = recipe.batch_size * step_factor ** (1.0 / power)
    whole = round(batch / granularity) * granularity
    if whole < 1 or abs(batch - whole) > 1e-6 * whole:
        raise Mistake(
            f"scaling the rate by {learning_rate_factor:g} and the momentum from "
            f"{recipe.momentum:g} to {new_momentum:g} asks for a batch of {batch:g}, which is no "
            f"multiple of {granularity}; change scale_up so that {recipe.batch_size} x "
            f"{'' if power == 1 else '('}rate factor x (1 - old momentum)/(1 - new momentum)"
            f"{'' if power == 1 else f')^{1 / power:g}'} is one."
        )
    if whole > recipe.examples:
        raise Mistake(
            f"scale_up takes the batch from {recipe.batch_size} to {whole}, over the "
            f"{recipe.examples} examples of the training set; scale up by less."
        )
    kappa, keep = whole / recipe.batch_size, recipe.per_example
    # By as much as before over the same examples: the rate times the decay grows with the batch.
    decay = kappa / learning_rate_factor if keep.weight_decay else 1.0
    if keeps_momentum(recipe) and momentum is None and not recipe.accumulates:
        new_momentum **= kappa
    scaled = dataclasses.replace(
        recipe,
        learning_rate=recipe.learning_rate * learning_rate_factor,
        batch_size=whole,
        momentum=new_momentum,
        beta2=recipe.beta2 ** (kappa if keeps_beta2(recipe) else 1.0),
        average=recipe.average ** (kappa if keep.average else 1.0),
        weight_decay=recipe.weight_decay * decay,
    )
    if kappa > 1:
        check_floors(scaled, scaled.momentum, scaled.beta2, f"scaled up to a batch of {whole}")
    return scaled


def keeps_momentum(recipe: Recipe) -> bool:
    """Whether the momentum is kept per example."""
    keep = recipe.per_example.momentum
    return not recipe.accumulates if keep is None else keep


def keeps_beta2(recipe: Recipe) -> bool:
    """Whether Adam's second beta is kept per example; what adds gradients up has none."""
    return recipe.per_example.beta2 and not recipe.accumulates


def check_floors(recipe: Recipe, momentum: float, beta2: float, where: str) -> None:
    """Checks what a larger batch leaves of coefficients that are kept per example.

    Args:
        recipe: of the run.
        momentum: of the batch.
        beta2: of the batch.
        where: which batch it is, for the message.

    Raises:
        Mistake: if one is below its floor.
    """
    keep = recipe.per_example
    for key, remains, floor, on in (
        ("momentum", momentum, keep.momentum_floor, keeps_momentum(recipe)),
        ("beta2", beta2, keep.beta2_floor, keeps_beta2(recipe)),
    ):
        if on and remains < floor:
            raise Mistake(
                f"kept per example, {key} falls to {remains:.3g} {where}, below "
                f"per_example.{key}_floor of {floor:g}; lower limits.max_batch_size or the floor, "
                f"or set per_example.{key}=False, which leaves it as it is."
            )


def stated(recipe: Recipe, strategy: str) -> Recipe:
    """The recipe that a strategy follows: "constant" has no falls, and no other smooth curve."""
    if strategy != "constant":
        return recipe
    return dataclasses.replace(recipe, falls=(), curve="steps")


def exchange_power(exchange: str) -> float:
    """The power p of an exchange; see `rates`.

    Raises:
        Mistake: if there is no such exchange.
    """
    if exchange not in EXCHANGES:
        raise Mistake(f"exchange is {exchange!r}; allowed are {', '.join(EXCHANGES)}.")
    return EXCHANGES[exchange]


def _check_momentum(name: str, momentum: float) -> None:
    if not 0.0 <= momentum < 1.0:
        raise Mistake(f"{name} is {momentum}; it must lie in [0, 1).")


def check(recipe: Recipe, strategy: str, limits: Limits) -> int:
    """Checks the values of a recipe and of limits; returns the granularity.

    Raises:
        Mistake: for a value that no schedule can have.
    """
    if strategy not in STRATEGIES:
        raise Mistake(f"strategy is {strategy!r}; allowed are {', '.join(STRATEGIES)}.")
    exchange_power(recipe.exchange)
    _check_momentum("recipe.momentum", recipe.momentum)
    _check_momentum("beta2", recipe.beta2)
    _check_momentum("ema", recipe.average)
    for name in ("learning_rate", "examples", "epochs"):
        value = getattr(recipe, name)
        if not (math.isfinite(value) and value > 0):
            raise Mistake(f"recipe.{name} is {value}; it must be a finite number over 0.")
    if recipe.epochs * recipe.examples > MOST_EXAMPLES:
        raise Mistake(
            f"recipe.epochs is {recipe.epochs:g}, which are over {MOST_EXAMPLES:g} examples, the "
            "most that a run can count."
        )
    _check_batches(recipe, limits)
    if recipe.curve == "steps":
        check_marks("recipe.falls", recipe.falls, recipe.epochs)
    _check_lengths(recipe)
    _check_warmup(recipe)
    growth = limits.growth
    lowest = 1 if recipe.curve == "steps" else 1.01
    if growth is not None and not lowest <= growth <= LARGEST_GROWTH:
        raise Mistake(
            f"limits.growth is {growth:g}, the smallest factor by which a batch grows at once; "
            f"under the curve {curves.name_of(recipe.curve)!r} it must be {lowest} or more, and "
            f"{LARGEST_GROWTH:g} at most."
        )
    return limits.ghost_size if limits.granularity is None else limits.granularity


def pairs(name: str, given: Any) -> tuple[tuple[float, float], ...]:
    """`given` as pairs of numbers.

    Raises:
        Mistake: if it is something else. Texts of digits are no numbers.
    """
    try:
        found = tuple((one, other) for one, other in given)
        wrong = [value for pair in found for value in pair
                 if isinstance(value, bool) or not hasattr(value, "__float__")]
    except (TypeError, ValueError):
        found, wrong = (), [given]
    if wrong:
        pair, example = {
            "by_hand": ("epoch, batch", "((30, 256), (60, 1024))"),
            "measured.losses": ("loss, batch", "((2.0, 256), (1.5, 1024))"),
        }.get(name, ("epoch, factor", "((60, 5), (120, 5))"))
        raise Mistake(f"{name} is {given!r}; it must be pairs of ({pair}), such as {example}.")
    return found


def check_marks(name: str, marks: Any, epochs: float) -> None:
    """Checks the (epoch, factor) of falls, or of a ramp.

    Raises:
        Mistake: if they are no pairs of numbers, a factor is not over 1, or an epoch is not after
            the one before it and inside of the run.
    """
    before = 0.0
    falls = name == "recipe.falls"
    marks = pairs(name, marks)
    for epoch, factor in marks:
        if not (math.isfinite(factor) and factor > 1):
            what = "they divide the learning rate of the reference" if falls else (
                "they multiply the batch")
            raise Mistake(
                f"{name} has a factor of {factor} at epoch {epoch:g}; factors must be finite and "
                f"over 1 ({what})."
            )
        if not before < epoch < epochs:
            raise Mistake(
                f"the epochs of {name} are {[at for at, _ in marks]} of {epochs:g}; each must come "
                f"after the one before it, over 0 and below the end, which {epoch:g} does not: "
                f"change {name} or recipe.epochs."
            )
        before = epoch


def _check_lengths(recipe: Recipe) -> None:
    """Raises Mistake if the run, or what comes before a fall, is not even one example."""
    falls = recipe.falls if recipe.curve == "steps" else ()
    for what, epoch in (("recipe.epochs is", recipe.epochs),
                        *(("recipe.falls has one at epoch", epoch) for epoch, _ in falls)):
        if round(epoch * recipe.examples) < 1:
            raise Mistake(
                f"{what} {epoch:g}, which is less than one of the {recipe.examples} examples of "
                "the training set; it must be one or more.")


def _check_warmup(recipe: Recipe) -> None:
    falls = recipe.falls if recipe.curve == "steps" else ()
    end = falls[0][0] if falls else recipe.epochs
    warm, last = (round(example) if math.isfinite(example) else example
                  for example in (recipe.warmup_epochs * recipe.examples, end * recipe.examples))
    if not (0 <= recipe.warmup_epochs and warm < last):
        raise Mistake(
            f"recipe.warmup_epochs is {recipe.warmup_epochs:g}; a warm-up must end before the "
            f"first fall or the end of the run, which is at epoch {end:g}."
        )
    if recipe.warmup_epochs and not 0 <= recipe.warmup_learning_rate <= recipe.learning_rate:
        raise Mistake(
            f"recipe.warmup_learning_rate is {recipe.warmup_learning_rate:g}; it must lie between "
            f"0 and recipe.learning_rate, {recipe.learning_rate:g}, to which the warm-up rises."
        )


def _check_batches(recipe: Recipe, limits: Limits) -> None:
    """Raises Mistake for a batch size over the training set or not a whole number of ghosts."""
    ghost = limits.ghost_size
    if ghost < 1:
        raise Mistake(f"ghost_size is {ghost}; it must be 1 or more.")
    granularity = ghost if limits.granularity is None else limits.granularity
    if granularity < 1 or granularity % ghost:
        raise Mistake(
            f"limits.granularity is {granularity}; it must be a multiple of the ghost batch of "
            f"{ghost}, so that every batch is a whole number of ghost batches."
        )
    named = [("recipe.batch_size", recipe.batch_size)]
    if limits.max_batch_size is not None:
        named.append(("limits.max_batch_size", limits.max_batch_size))
    for name, batch in named:
        if batch < 1 or batch % granularity:
            below = max(batch, 0) // granularity * granularity
            nearest = sorted({max(below, granularity), below + granularity})
            raise Mistake(
                f"{name} is {batch}; it must be a multiple of {granularity} "
                f"({'the ghost batch' if granularity == ghost else 'limits.granularity'}), for "
                f"example {' or '.join(map(str, nearest))}."
            )
        if batch > recipe.examples:
            raise Mistake(
                f"{name} is {batch}, over the {recipe.examples} examples of the training set; "
                "a batch may hold the whole set at most."
            )
    if limits.max_batch_size is not None and limits.max_batch_size < recipe.batch_size:
        raise Mistake(
            f"limits.max_batch_size is {limits.max_batch_size}, below the first batch of "
            f"{recipe.batch_size}; raise it or lower the batch (scale_up raises the batch too)."
        )
