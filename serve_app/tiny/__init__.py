"""A tiny trained Wan2.2 checkpoint that draws moving coloured shapes, and the recipe that it was trained by.

Importing this package loads nothing heavy. `CHECKPOINT` is the folder in the diffusers layout.
"""

from pathlib import Path

CHECKPOINT: Path = Path(__file__).parent / "checkpoint"

__all__ = ["CHECKPOINT"]
