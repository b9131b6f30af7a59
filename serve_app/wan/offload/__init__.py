"""Block swap: experts larger than the device memory that is left for them.

Knows nothing of samples.
"""
