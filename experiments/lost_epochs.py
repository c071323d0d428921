"""Epochs lost to momentum, read off learning curves (appendix A).

The accumulator starts at 0 and fills over 1/(1-m) updates, which is tau = B/(N(1-m)) epochs. After
t epochs, training at a constant rate and batch has gone as far as t - tau (1 - exp(-t/tau)) epochs
with a full accumulator would go: in the end tau epochs are lost. With B in proportion to 1/(1-m)
and all else equal, runs differ in nothing but tau, which can thus be fitted to when two curves pass
the same loss.
"""

import numpy as np
from scipy.optimize import minimize_scalar
from sklearn.isotonic import IsotonicRegression

LEVELS = 40


def progress(epochs: np.ndarray, tau: float) -> np.ndarray:
    """How many epochs with a full accumulator `epochs` of training are worth."""
    return epochs + tau * np.expm1(-epochs / tau)


def fit(
    epochs: np.ndarray, losses: np.ndarray, reference_epochs: np.ndarray,
    reference_losses: np.ndarray, reference_tau: float,
) -> float:
    """Tau of a run, from its training losses and those of a reference with a known one.

    Args:
        epochs: rising; when `losses` were measured.
        losses: noisy; a falling curve is fitted to them.
        reference_epochs: the same of a run with a small tau.
        reference_losses: the same of it.
        reference_tau: B/(N(1-m)) of the reference, in epochs.
    """
    ours, theirs = _falling(epochs, losses), _falling(reference_epochs, reference_losses)
    # Losses that both curves pass, without the ends, which an isotonic fit flattens.
    high = min(np.quantile(ours, 0.98), np.quantile(theirs, 0.98))
    low = max(np.quantile(ours, 0.02), np.quantile(theirs, 0.02))
    if not low < high:
        raise ValueError("the two runs have no training loss in common: nothing can be fitted.")
    levels = np.linspace(high, low, LEVELS)
    reached = _when(epochs, ours, levels)
    worth = progress(_when(reference_epochs, theirs, levels), reference_tau)

    def squares(log_tau: float) -> float:
        return float(np.square(progress(reached, np.exp(log_tau)) - worth).sum())

    longest = np.log(10 * epochs[-1])
    return float(np.exp(minimize_scalar(squares, bounds=(np.log(1e-3), longest)).x))


def _falling(epochs: np.ndarray, losses: np.ndarray) -> np.ndarray:
    return IsotonicRegression(increasing=False).fit_transform(epochs, losses)


def _when(epochs: np.ndarray, falling: np.ndarray, levels: np.ndarray) -> np.ndarray:
    return np.interp(-levels, -falling, epochs)
