"""The ranks of a group: mesh, process groups, and what they exchange.

Knows nothing of samples.
"""
