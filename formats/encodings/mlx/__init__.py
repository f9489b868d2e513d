"""MLX: how its weights are stored."""
