"""The parts that all routes share: callers, errors, middleware, stored files as responses. Knows nothing of videos."""
