"""The VAE: from latents to frames.

Knows nothing of denoising.
"""
