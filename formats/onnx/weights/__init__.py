"""Finds the initializers that are quantized weights, and how they are decoded."""
