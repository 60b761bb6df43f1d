"""The user's files, read block by block: GGUF and safetensors."""
