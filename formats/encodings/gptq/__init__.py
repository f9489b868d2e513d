"""GPTQ: how its weights are stored."""
