"""Pruning: weights set to zero."""
