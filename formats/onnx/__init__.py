"""ONNX: weights as initializers, quantized ones behind DequantizeLinear."""
