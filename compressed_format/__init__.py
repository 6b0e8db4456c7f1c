"""Compressed model checkpoints: configs, packed safetensors, and modules that run from them."""
