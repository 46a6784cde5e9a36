"""Options of a run: their groups, types and defaults, methods, presets and files."""
