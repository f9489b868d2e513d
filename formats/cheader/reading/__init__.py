"""C that the writer made, read back."""
