"""The least number of blocks that pass through a device, and the words for less memory than that. Needs no torch."""

from __future__ import annotations

PASSING_SLOTS = 2
"""Slots for the blocks that are not resident: one to use, one to fill."""


def no_room_for_blocks(budget: float, block_bytes: float) -> str:
    """Return the error where not even the blocks in use fit.

    Args:
        budget: bytes that all blocks on the device may take.
        block_bytes: bytes of one of them.
    """
    return (
        f"denoiser.memory_fraction leaves {max(0.0, budget) / 2**20:.0f} MiB for blocks beside a step of the largest "
        f"request, expected {PASSING_SLOTS * block_bytes / 2**20:.0f} MiB or more, for {PASSING_SLOTS} blocks"
    )
