"""How quantized weights lie in a state dict, whichever container (.safetensors, .pt, .bin) holds it: a module each."""
