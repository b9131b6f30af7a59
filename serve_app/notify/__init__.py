"""Notifications that a video has ended: webhooks and e-mail, sent from the database until they arrive.

Knows nothing of our own HTTP routes, nor of how jobs are run.
"""
