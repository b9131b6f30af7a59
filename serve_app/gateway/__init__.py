"""The ways in: the OpenAI videos API over HTTP, a web page, and the same operations as handle calls on Ray.

Knows jobs and storage; knows nothing of the model or the stages, which it reaches only through the job store.
"""
