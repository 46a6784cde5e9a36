"""Plans of runs: sizes, memory, disk and time, and the engines that can load the result."""
