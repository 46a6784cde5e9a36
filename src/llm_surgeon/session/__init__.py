"""Checks before a run: of the model and tokenizer that a caller has given, and of what the recipe needs of them."""
