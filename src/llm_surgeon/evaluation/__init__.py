"""Measurements of models, dense and pruned: perplexity, divergence, tasks, speed and the overlap of masks.

This package runs models and never changes them.
"""
