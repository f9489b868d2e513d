"""Which initializers are quantized weights, and how they are decoded."""
