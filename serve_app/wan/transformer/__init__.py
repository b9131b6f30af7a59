"""An expert on one rank: how it is loaded and how its forward pass differs from the library's.

Knows nothing of samples.
"""
