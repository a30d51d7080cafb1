"""What several benchmarks share: timing, memory, processes, models, and the file of results."""
