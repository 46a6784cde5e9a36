"""Structures, loops and targets: which weights go, in which order, and the matrices that stay."""
