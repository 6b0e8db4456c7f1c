"""Modules that run from packed tensors, and what others see of them."""
