"""Durable jobs: the store that owns their state, their order, leases and transitions, and estimates of their time.

Knows nothing of HTTP, of dispatchers, nor of how a video is made.
"""
