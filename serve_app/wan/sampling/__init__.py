"""Sampling: samples, their steps and their snapshots.

Knows nothing of groups, jobs or Ray.
"""
