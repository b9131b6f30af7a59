"""Fixed and variable cost of a forward pass, learnt from the passes that were made.

Pure: knows neither samples nor what a unit of work is.
"""

from __future__ import annotations

# Weight of a pass after each newer one: about fifty passes count, so the estimate follows a change of shapes.
_DECAY = 0.98


class PassTime:
    """A straight line, by least squares, through the times of passes over their work; older passes weigh less."""

    def __init__(self) -> None:
        self._n = self._x = self._t = self._xx = self._xt = 0.0

    def learn(self, work: float, seconds: float) -> None:
        """Add a pass: its work, and the seconds that it took."""
        self._n, self._x, self._t, self._xx, self._xt = (
            _DECAY * old + new
            for old, new in (
                (self._n, 1.0),
                (self._x, work),
                (self._t, seconds),
                (self._xx, work * work),
                (self._xt, work * seconds),
            )
        )

    @property
    def per_pass(self) -> float:
        """Fixed cost of a pass in units of work, which is what sharing a pass saves.

        0 while it is unknown, until passes of different work were seen.
        """
        spread = self._n * self._xx - self._x**2
        if spread <= 1e-9 * self._n * self._xx:
            return 0.0
        per_work = (self._n * self._xt - self._x * self._t) / spread
        fixed = (self._t - per_work * self._x) / self._n
        return fixed / per_work if per_work > 0 and fixed > 0 else 0.0
