"""The machine below a run: processes, memory, storage, files, progress and logs.

This package knows no models and no curvature: it moves tensors and writes files whatever they mean.
"""
