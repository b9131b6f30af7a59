"""What a forward pass costs whatever is in it, and what each unit of work adds: learnt from the passes that were made.

Pure: knows neither samples nor what a unit is.
"""

from __future__ import annotations

# Weight that a pass loses with each newer one: some fifty of them count, so the estimate follows other shapes.
_DECAY = 0.98


class PassTime:
    """A straight line through the times of passes over their work, by least squares; older passes weigh less."""

    def __init__(self) -> None:
        self._n = self._x = self._t = self._xx = self._xt = 0.0

    def learn(self, work: float, seconds: float) -> None:
        """A pass over so much work took so long."""
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
        """Work that could be done in the time that a pass takes without any: what sharing one saves. 0 while unknown,
        which it is until passes of different work were seen."""
        spread = self._n * self._xx - self._x**2
        if spread <= 1e-9 * self._n * self._xx:
            return 0.0
        per_work = (self._n * self._xt - self._x * self._t) / spread
        fixed = (self._t - per_work * self._x) / self._n
        return fixed / per_work if per_work > 0 and fixed > 0 else 0.0
