"""One run: its events and figures, its directory and checkpoints, and the program that ties them together."""
