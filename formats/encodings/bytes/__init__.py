"""How codes lie in bytes, whatever they mean."""
