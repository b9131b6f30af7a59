"""The Serve deployments: encoder, denoiser and decoder, and the pipeline that composes them.

Knows nothing of HTTP, of jobs in a database, or of who asked.
"""
