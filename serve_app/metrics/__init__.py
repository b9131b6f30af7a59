"""Metrics: what this process counts and measures, in one catalog, and the export of it by Ray's agents.

Knows nothing of jobs, HTTP or the model. Only `export` knows Ray.
"""
