"""What acts once an update, as one update takes it."""

from typing import NamedTuple


class Rates(NamedTuple):
    """The numbers of one update that may differ from update to update.

    They are inputs of the compiled update, so a new value needs no compilation.
    """

    learning_rate: float  # eps
    momentum: float  # what an update leaves of the accumulator; for Adam its first beta
    beta2: float  # what an update leaves of Adam's average of squared gradients
    weight_decay: float  # decoupled: an update shrinks the weights by learning_rate x this
    average: float  # what an update leaves of the average of the weights (`config.ema`)
