"""An expert on one rank: loading it, and its forward pass.

Knows nothing of samples.
"""
