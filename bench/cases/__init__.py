"""The benchmarks on a CPU, and scripts that measure how often an answer is right."""
