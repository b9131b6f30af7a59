"""Plans of deployments before anything is started: memory, seconds, meshes, and the file to serve.

Knows neither Ray, HTTP nor the job store, and needs no torch: whoever decides by numbers may ask it.
"""
