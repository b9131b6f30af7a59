"""A simulator of a fleet: the real scheduler, order, autoscaling and degrading on a virtual clock, fed by a trace.

Knows neither Ray, HTTP nor a database.
"""
