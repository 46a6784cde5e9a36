"""One run as its stages see it, and the checks before it."""
