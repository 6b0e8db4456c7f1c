"""From dense modules to compressed ones in memory, and back."""
