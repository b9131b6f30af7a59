"""Finishing steps of a decoded video: interpolation, upscaling, encoding and labelling.

Knows nothing of Ray, HTTP, SQL or the model that made the frames. `plan` needs pydantic only, so that requests can hold
it. Only a step that runs an operator's model imports torch.
"""
