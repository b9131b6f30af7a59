"""The Wan2.2 model path: text to embeddings, embeddings to latents, latents to frames, frames to an mp4 file.

Knows nothing of Ray, HTTP or SQL: it can be used in a notebook, and every process of the service is built on it.
"""
