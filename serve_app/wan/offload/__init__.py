"""Block swap: experts larger than the memory that a device has for them.

Knows nothing of samples.
"""
