"""Checks of a running deployment: what is wrong on which host or service, and what to do about it.

Changes nothing but one small object of the storage, which it removes again.
"""
