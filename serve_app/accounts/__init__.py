"""API keys, their scopes and limits.

Knows neither HTTP nor how jobs are run.
"""
