"""The database: engine, sessions, migrations, every table, and what a call raises while it is away.

Knows nothing of what the rows mean to jobs, accounts or notifications.
"""
