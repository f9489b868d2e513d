"""Fine-grained FP8: how its weights are stored."""
