"""Pure functions of tensors: factors, costs, updates, selections and scores.

This package knows no models, recipes, files or processes. A layer is a matrix with a name for messages.
"""
