"""Comparison of methods on one model, one calibration text and one evaluation text: one table of cells."""
