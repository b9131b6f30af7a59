"""The start and the end of a server: checks, the Ray that it joins or starts, and the guard that ends it.

Knows nothing of how videos are made.
"""
