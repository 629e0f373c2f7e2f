"""Whether a mean is above zero: asked after every value, and rarely wrong.

A gambler bets, value by value, that the mean of what comes is above zero. Were it zero or less,
no stake would make money on average, so a large fortune is evidence. Because nobody knows when the
change comes, a new gambler starts at every value: the sum of their fortunes

    M_t = (M_{t-1} + 1) e_t,        e_t = 1 + stake * gain_t / most_loss_t

is the e-detector of Shiryaev-Roberts type of Shin, Ramdas and Rinaldo (2022, arXiv 2203.03532,
section 2), with the bets of Waudby-Smith and Ramdas (2024, arXiv 2010.09686). While the mean is at
most zero, M_t - t falls on average, so the mean number of values until M_t first reaches 1 / alpha
is at least 1 / alpha, whatever the distribution; values may depend on those before them. The
average of several detectors, one a stake, is one too, which spares us the best stake.
"""

from __future__ import annotations

import numpy as np

from amips_plugins.errors import InvalidInput

__all__ = ["Detector"]

_STAKES = 0.9 * 0.5 ** np.arange(8)
"""Shares of the most that can be staked: a small, frequent gain wants small stakes."""


class Detector:
    """Tells when the mean of a stream is above zero.

    Raises
    ------
    InvalidInput
        ``alpha`` is not between 0 and 1.

    Examples
    --------
    >>> detector = Detector(alpha=0.01)
    >>> [detector.add(gain, most_loss=0.1) for gain in (-0.1, 0.2, 0.3, 0.2)]
    [False, False, False, True]
    """

    def __init__(self, alpha: float) -> None:
        if not 0.0 < alpha < 1.0:
            raise InvalidInput(f"alpha={alpha!r} is no rate; pass a number between 0 and 1.")
        self._enough = 1.0 / alpha
        self._fortunes = np.zeros(len(_STAKES))

    def add(self, gain: float, most_loss: float) -> bool:
        """Add a value; from the first alarm on, start over with a new detector."""
        # A value a rounding error below its bound must not make a fortune negative.
        lost = max(gain / most_loss, -1.0)
        self._fortunes = (self._fortunes + 1.0) * (1.0 + _STAKES * lost)
        return bool(self._fortunes.mean() >= self._enough)
