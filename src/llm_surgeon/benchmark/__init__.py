"""Benchmark of dense and pruned models in isolated processes."""
