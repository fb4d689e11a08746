"""What everything else stands on: files, processes, the terminal, paths and addresses; nothing of GLUE in it."""
