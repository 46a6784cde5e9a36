"""One opening, the shots, the checkpoints and the export of a run."""
