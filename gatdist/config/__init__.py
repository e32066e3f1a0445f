"""The configuration: frozen models, TOML files, ``--set`` overrides, and clear refusals.

A configuration is read once, by the driver, and travels as JSON to the workers and into
``config.json``. ``${env:NAME}`` in URLs and storage options stays a reference until the moment of
use (:func:`expand_env`), so that a secret never enters a file.
"""

from gatdist.config.environment import (
    REFERENCE,
    cache_folder,
    env_references,
    expand_env,
    import_plugins,
    is_secret,
    masked_url,
)
from gatdist.config.fields import BOTH, NamedConfig, PlayerName
from gatdist.config.loading import (
    load_config,
    nearest,
    parse_config,
    preset_names,
    require_unchanged,
    set_value,
)
from gatdist.config.models import Config, flatten
from gatdist.config.sections import (
    ClusterConfig,
    ConvergenceConfig,
    DataConfig,
    EvaluateConfig,
    GameConfig,
    HealthConfig,
    ModelConfig,
    MonitorConfig,
    OptimConfig,
    PenaltyConfig,
    PlayerOptimConfig,
    PrecisionConfig,
    RunConfig,
)

__all__ = [
    "BOTH",
    "REFERENCE",
    "ClusterConfig",
    "Config",
    "ConvergenceConfig",
    "DataConfig",
    "EvaluateConfig",
    "GameConfig",
    "HealthConfig",
    "ModelConfig",
    "MonitorConfig",
    "NamedConfig",
    "OptimConfig",
    "PenaltyConfig",
    "PlayerName",
    "PlayerOptimConfig",
    "PrecisionConfig",
    "RunConfig",
    "cache_folder",
    "env_references",
    "expand_env",
    "flatten",
    "import_plugins",
    "is_secret",
    "load_config",
    "masked_url",
    "nearest",
    "parse_config",
    "preset_names",
    "require_unchanged",
    "set_value",
]
