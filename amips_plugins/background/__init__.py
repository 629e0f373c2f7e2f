"""Work off the caller's path: daemon threads, forks, the end of the process; what is left alone."""
