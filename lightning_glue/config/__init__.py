"""The configuration of a run: ``conf/`` composed by Hydra into a typed schema, its keys and its identity."""

from lightning_glue.config.compose import compose, compose_tune, experiments, models_in_words, options, quote
from lightning_glue.config.identity import (
    decides,
    digest,
    flatten,
    identity,
    nested,
    recorded,
    unflatten,
    without_place,
)
from lightning_glue.config.schema import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    TaskConfig,
    TrackingConfig,
    TrainerConfig,
    TuneConfig,
    data_file,
    keys,
    task_file,
    task_of,
)

__all__ = [
    "Config", "DataConfig", "ModelConfig", "OptimizerConfig", "TaskConfig", "TrackingConfig", "TrainerConfig",
    "TuneConfig", "compose", "compose_tune", "data_file", "decides", "digest", "experiments", "flatten", "identity",
    "keys", "models_in_words", "nested", "options", "quote", "recorded", "task_file", "task_of", "unflatten",
    "without_place",
]  # fmt: skip
