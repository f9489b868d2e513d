"""C source: a header and a source file with weights as constant arrays."""
