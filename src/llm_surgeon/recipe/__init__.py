"""Options of a run: their types, defaults, methods, presets and files."""
