"""AWQ: how its weights are stored."""
