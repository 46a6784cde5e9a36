"""Processes, memory, storage, files, progress and logs."""
