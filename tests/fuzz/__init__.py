"""Nonsense for every door of the command line: what comes back is an exit code and a line, never a traceback or a hang."""
