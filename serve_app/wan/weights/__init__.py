"""Checkpoints: formats, readers, the slice of each rank, sharded checkpoints and their writer.

Knows nothing of samples.
"""
