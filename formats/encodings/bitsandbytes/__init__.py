"""bitsandbytes: how its weights are stored."""
