"""Compact filters: cheaper kinds of convolution."""
