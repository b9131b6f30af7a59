"""What `wan-serve up` does around a deployment: checks, the Ray that it joins or starts, the guard that ends it.

Knows nothing of how videos are made.
"""
