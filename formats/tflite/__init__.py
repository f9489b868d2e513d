"""TensorFlow Lite / LiteRT (https://ai.google.dev/edge/litert)."""
