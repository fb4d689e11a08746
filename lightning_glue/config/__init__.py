"""The configuration of a run: ``conf/`` composed by Hydra into a typed schema, its keys and its identity."""

from lightning_glue.config.compose import compose, compose_tune, experiments, options, quote
from lightning_glue.config.identity import decides, digest, flatten, identity, nested, recorded, unflatten
from lightning_glue.config.schema import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    TaskConfig,
    TrackingConfig,
    TrainerConfig,
    TuneConfig,
    keys,
)

__all__ = [
    "Config", "DataConfig", "ModelConfig", "OptimizerConfig", "TaskConfig", "TrackingConfig", "TrainerConfig",
    "TuneConfig", "compose", "compose_tune", "decides", "digest", "experiments", "flatten", "identity", "keys",
    "nested", "options", "quote", "recorded", "unflatten",
]  # fmt: skip
