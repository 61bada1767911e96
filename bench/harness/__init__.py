"""What all benchmarks share: timing, child processes, result files and tables."""
