"""What a run will take and give, said before it: sizes, memory, disk, time, and who can load the result."""
