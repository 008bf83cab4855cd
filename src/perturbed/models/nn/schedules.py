"""Weights that change over training, as pure functions of the epoch."""

from __future__ import annotations


def warm_up_linearly(epoch: int, n_epochs: int, delay: int = 0) -> float:
    """Weight in [0, 1] of a term that is phased in over the first epochs.

    `w(e) = min(1, max(0, (e − delay + 1) / (n_epochs + 1)))`, so that the first epoch after the delay already has a
    small weight and epoch `delay + n_epochs` is the first with full weight.

    Parameters
    ----------
    epoch
        Epoch, counted from 0.
    n_epochs
        Epochs with a weight strictly between 0 and 1; 0 gives full weight at once.
    delay
        Epochs with weight 0 before that.

    Raises
    ------
    ValueError
        If any argument is negative.
    """
    if min(epoch, n_epochs, delay) < 0:
        raise ValueError(f"epoch, n_epochs and delay must not be negative, got {epoch}, {n_epochs}, {delay}")
    return min(1.0, max(0.0, (epoch - delay + 1) / (n_epochs + 1)))


def fall_linearly(epoch: int, n_epochs: int, start: float, final_share: float) -> float:
    """Value that falls from `start` in the first epoch to `final_share · start` in the last.

    Parameters
    ----------
    epoch
        Epoch, counted from 0.
    n_epochs
        Epochs of the whole run.
    start, final_share
        First value, and the share of it that is left in epoch `n_epochs − 1`.
    """
    progress = epoch / (n_epochs - 1) if n_epochs > 1 else 0.0
    return start * (1 - (1 - final_share) * progress)
