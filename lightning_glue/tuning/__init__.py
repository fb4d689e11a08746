"""The search for hyperparameters: spaces, studies, the trials of this machine, recipes."""
