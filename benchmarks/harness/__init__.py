"""What the benchmarks of this folder share: rounds of measuring, what the machine can do at most, and bars."""
