"""One denoiser group: which samples step next, and the ranks that do the step.

Knows Ray actors and the model, but neither Serve, HTTP nor jobs.
"""
