"""Passes of text through a model, with hooks that look on."""
