"""Base models. Each carries its own input preprocessing, so that an exported file needs nothing else."""
