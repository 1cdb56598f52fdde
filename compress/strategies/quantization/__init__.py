"""Quantization: weights and activations in fewer bits."""
