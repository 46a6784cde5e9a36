"""Passes of text through a model, with hooks that look on.

A pass changes no weights. Estimators and stages say what their hooks collect.
"""
