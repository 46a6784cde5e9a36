"""Reports of runs for readers: tables for the terminal, pictures, the page of a run, and the model card."""
