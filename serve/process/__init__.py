"""The server as a process: start, replace dead workers, stop."""
