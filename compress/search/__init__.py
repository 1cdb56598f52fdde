"""Search over pipelines: which setting to try next, and what has been found so far."""
