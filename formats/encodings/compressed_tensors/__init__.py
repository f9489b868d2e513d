"""compressed-tensors: how its weights are stored."""
