"""The videos API: requests, resources, routes, events. Knows nothing of Ray."""
