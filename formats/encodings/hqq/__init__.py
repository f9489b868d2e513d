"""HQQ: how its weights are stored."""
