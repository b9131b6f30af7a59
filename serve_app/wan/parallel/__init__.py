"""The ranks of a group: mesh, process groups, and their communication.

Knows nothing of samples.
"""
