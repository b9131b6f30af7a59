"""Attention backends and fused operations.

Knows neither checkpoints nor samples.
"""
