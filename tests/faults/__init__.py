"""Faults of the disk, and deaths of the process, at every file operation of a run."""
