"""Epochs lost to momentum, read off learning curves (appendix A).

The accumulator starts at 0 and fills over 1/(1-m) updates, which is tau = B/(N(1-m)) epochs. After
t epochs, training at a constant rate and batch has moved as far as a full accumulator would have in
t - tau (1 - exp(-t/tau)) epochs. So much is lost, and in the end tau epochs. With B in proportion
to 1/(1-m) and all else equal, runs differ in nothing but tau: when a run with a small one had the
same training loss tells how many epochs another has lost.
"""

import numpy as np
from sklearn.isotonic import IsotonicRegression


def progress(epochs: np.ndarray, tau: float) -> np.ndarray:
    """How many epochs with a full accumulator `epochs` of training are worth."""
    return epochs + tau * np.expm1(-epochs / tau)


def worth(
    epochs: np.ndarray, losses: np.ndarray, reference_epochs: np.ndarray,
    reference_losses: np.ndarray, reference_tau: float, at: np.ndarray,
) -> np.ndarray:
    """How many epochs with a full accumulator a run's training was worth `at` its epochs.

    Args:
        epochs: rising; when `losses` were measured.
        losses: noisy; a falling curve is fitted to them.
        reference_epochs: the same of a run with a small tau.
        reference_losses: the same of it.
        reference_tau: B/(N(1-m)) of the reference, in epochs.
        at: epochs of the run to answer for.
    """
    ours, theirs = _falling(epochs, losses), _falling(reference_epochs, reference_losses)
    reached = np.interp(-np.interp(at, epochs, ours), -theirs, reference_epochs)
    return progress(reached, reference_tau)


def _falling(epochs: np.ndarray, losses: np.ndarray) -> np.ndarray:
    return IsotonicRegression(increasing=False).fit_transform(epochs, losses)
