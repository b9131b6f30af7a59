"""Dashboards of Grafana and alert rules of Prometheus, made from small Python classes.

Knows the names of metrics, and neither Ray nor the model.
"""
