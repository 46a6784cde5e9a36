"""Showing what a run did: tables, pictures, the model card, and the progress of a run under way."""
