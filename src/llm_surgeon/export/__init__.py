"""Export of a pruned model as a checkpoint for plain transformers, with the check that it computes the same."""
