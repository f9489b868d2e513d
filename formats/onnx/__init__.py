"""ONNX: weights are initializers, and quantized weights are decoded by DequantizeLinear."""
