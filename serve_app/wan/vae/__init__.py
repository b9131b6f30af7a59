"""From latents to frames.

Knows nothing of denoising.
"""
