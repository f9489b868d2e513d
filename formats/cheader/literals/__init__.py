"""Numbers as C literals."""
