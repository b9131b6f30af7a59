"""Durable jobs: the table that owns their state, and the dispatcher that drives them through a pipeline.

Knows nothing of the routes of our API, nor of how a video is made: the pipeline is a callable that yields events.
"""
