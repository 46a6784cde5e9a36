"""Measuring what was won and lost."""
