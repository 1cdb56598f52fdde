"""Strategies in order: guarantees checked before and after, every stage measured on its exported file."""
