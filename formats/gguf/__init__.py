"""GGUF, the files of llama.cpp and ggml (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md)."""
