"""safetensors (https://github.com/huggingface/safetensors)."""
