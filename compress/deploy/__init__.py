"""From a candidate to files that run on a board."""
