"""From a training to MLflow: a journal beside it, a process that delivers it, and what is made of the runs."""
