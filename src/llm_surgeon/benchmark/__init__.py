"""Benchmark of dense and pruned models: loading time and memory of isolated processes, and speed in pairs."""
