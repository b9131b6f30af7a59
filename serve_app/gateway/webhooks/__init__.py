"""The webhooks API: endpoints, deliveries, replay.

Knows nothing of Ray.
"""
