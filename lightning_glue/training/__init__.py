"""One training: module, metrics, optimizer, devices, checkpoints, and the run around it."""
