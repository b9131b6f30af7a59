"""Samples and their steps.

Knows nothing of groups, jobs or Ray.
"""
