"""The database: engine, sessions, migrations, every table, and the exceptions of one that is away.

Knows nothing of the rules by which jobs, accounts and notifications change their rows.
"""
