"""Runs: their opening, their shots, their directory with the checkpoints, and their export."""
