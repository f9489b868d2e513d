"""torchao: how its weights are stored."""
