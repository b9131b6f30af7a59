"""Dispatchers, which lease jobs from the store and drive them through a pipeline.

Knows neither HTTP nor the model.
"""
