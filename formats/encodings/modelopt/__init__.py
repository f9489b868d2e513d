"""NVIDIA ModelOpt: how its weights are stored."""
