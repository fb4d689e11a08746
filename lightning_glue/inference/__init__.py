"""A fine-tuned model loaded again: predictions, leaderboard files, MLflow's pyfunc."""
