"""State dicts of modules, and quantizers in them."""
