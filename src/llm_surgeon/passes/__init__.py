"""Passes of text through a model, with hooks that look on.

A pass changes no weights, and knows no pruning: estimators and stages say what their hooks collect.
"""
