"""Memory pressure of a group: whether its ranks have so little memory left that it has to take less.

Pure, without Ray or torch, so that its rules can be tested alone.
"""

from __future__ import annotations

from serve_app.logs import get_logger

logger = get_logger(__name__)

TENTH = 0.1
"""Share of a rank's memory that shall stay free. Below it no batch mates join, and samples are parked on the host."""
_ENOUGH = 0.15  # from which on the group is as before
_HOLD = 8  # passes for which it stays careful: without mates there is more memory, which says nothing of how it was


class Pressure:
    """The pressure as the passes of a group tell it.

    Attributes:
        tight: whether memory is short.
    """

    def __init__(self) -> None:
        self.tight = False
        self._passes = 0
        self._told = False

    def note(self, headroom: float, largest: str) -> None:
        """Take in what a pass has left.

        Below half of the tenth one line names the component that takes most; it comes again only after memory was free.

        Args:
            headroom: share of a rank's memory that the pass has left, of the rank that has least.
            largest: the component that takes most beside the weights, in words.
        """
        if headroom < TENTH:
            if not self.tight:
                logger.info("memory is short: no batch mates, samples parked in host memory", extra=_told(headroom))
            self.tight, self._passes = True, _HOLD
        elif self.tight:
            self._passes -= 1
            if self._passes <= 0 and headroom >= _ENOUGH:
                self.tight = self._told = False
                logger.info("memory is free again", extra=_told(headroom))
        if headroom < TENTH / 2 and not self._told:
            self._told = True
            logger.warning("memory is nearly full", extra={**_told(headroom), "most": largest})


def _told(headroom: float) -> dict[str, str]:
    return {"left": f"{100 * headroom:.1f} %"}
