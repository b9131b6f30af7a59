"""API keys: who may do what and how much.

Knows neither HTTP nor how jobs are run.
"""
