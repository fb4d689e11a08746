"""One training in a warm process on a slot of this machine, with its reports; nothing of hyperparameters in it."""
