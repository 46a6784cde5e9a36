"""Exports for vLLM's own classes, and the check that vLLM computes what the model in memory does."""
