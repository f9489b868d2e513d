"""The ONNX file: protobuf, headers, payloads."""
