"""What every route shares: who calls, errors, middleware, stored files as responses.

Knows nothing of videos.
"""
