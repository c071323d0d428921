"""Epochs lost to momentum, read off learning curves (appendix A).

The accumulator starts at 0 and fills over 1/(1-m) updates, which is tau = B/(N(1-m)) epochs. After
t epochs, training at a constant rate and batch has moved as far as a filled accumulator would have
in t - tau (1 - exp(-t/tau)) epochs. The difference is lost; in the end it is tau epochs. With B in
proportion to 1/(1-m) and all else equal, runs differ in tau alone. So the epochs that a run has
lost follow from when a run with a small tau reached the same training loss.
"""

import numpy as np
from sklearn.isotonic import IsotonicRegression


def progress(epochs: np.ndarray, tau: float) -> np.ndarray:
    """Epochs with a filled accumulator that move as far as `epochs` from an empty one."""
    return epochs + tau * np.expm1(-epochs / tau)


def equivalent_epochs(
    epochs: np.ndarray, losses: np.ndarray, reference_epochs: np.ndarray,
    reference_losses: np.ndarray, reference_tau: float, at: np.ndarray,
) -> np.ndarray:
    """Epochs of training with a filled accumulator that reach the same loss as a run.

    Args:
        epochs: at which the run's `losses` were measured, rising.
        losses: of the run, noisy; a falling curve is fitted to them.
        reference_epochs: those of a run with a small tau.
        reference_losses: those of the same run.
        reference_tau: B/(N(1-m)) of the reference, in epochs.
        at: the epochs of the run at which its loss is compared.
    """
    ours, theirs = _falling(epochs, losses), _falling(reference_epochs, reference_losses)
    reached = np.interp(-np.interp(at, epochs, ours), -theirs, reference_epochs)
    return progress(reached, reference_tau)


def _falling(epochs: np.ndarray, losses: np.ndarray) -> np.ndarray:
    return IsotonicRegression(increasing=False).fit_transform(epochs, losses)
