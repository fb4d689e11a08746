"""Fine-tune fairseq's RoBERTa on GLUE with PyTorch Lightning, MLflow and Optuna."""

import os

# Read when torch is first imported. By default OpenMP threads spin at every barrier; beside any other busy process
# a training step then takes ten times as long. Sleeping threads cost nothing measurable on an idle machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Read when MLflow is first imported. It would report its use to its makers, from a thread of its own.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

if "LIGHTNING_GLUE_PARENT" in os.environ:  # before anything that takes seconds to import
    from lightning_glue.utils.processes import end_with_parent

    end_with_parent()

__version__ = "0.2.0"
