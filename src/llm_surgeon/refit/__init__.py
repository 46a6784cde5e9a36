"""Stages after a shot: reconstruction, gates, cross-fitting and low-rank corrections."""
