"""Other libraries' models. Each module imports its library when it is imported itself, and is imported on use."""
