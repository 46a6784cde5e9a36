"""Entries of the supported architectures, one file each."""
