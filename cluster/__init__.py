"""Files for deploying and trying the server. `cluster.dev` runs several hosts on one machine.

Knows nothing of serve_app and is no part of the installed package.
"""
