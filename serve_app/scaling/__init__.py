"""Autoscaling by the work that waits in the durable queue: a policy for Serve's controller, and what it reads.

Knows nothing of HTTP, of dispatchers, nor of how a video is made.
"""
