"""Recovery: training of a pruned model after pruning, on its dense model's predictions or on text alone."""
