"""Structures, loops and targets of pruning: the weights that go, the order of the work, and the weights that stay."""
