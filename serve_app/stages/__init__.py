"""The Serve deployments: encoder, denoiser and decoder, and the pipeline that composes them.

Imports neither HTTP nor the job store.
"""
