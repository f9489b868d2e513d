"""A TFLite graph in ONNX's operators: floats inside, QuantizeLinear and DequantizeLinear where TFLite has integers."""
