"""Checkpoints: formats, readers, the shard spec, sharded checkpoints and their writer.

Knows nothing of samples.
"""
