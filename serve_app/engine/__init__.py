"""The engine of one denoiser group: which samples step next, and the ranks that make the step.

Imports Ray actors and the model, but neither Serve, HTTP nor the job store.
"""
