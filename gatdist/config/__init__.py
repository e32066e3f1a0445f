"""The configuration: frozen models, TOML files and ``--set`` overrides.

The driver reads it once, and sends it as JSON to the workers and into ``config.json``.
``${env:NAME}`` in URLs and storage options stays a reference until it is used
(:func:`expand_env`), so that a secret never enters a file.
"""

from gatdist.config.environment import (
    REFERENCE,
    cache_folder,
    cuda_variables,
    env_values,
    expand_env,
    import_plugins,
    is_secret,
    redact_url,
    require_deterministic_workspace,
    set_cuda_variables,
    set_env,
    silence_profiler,
)
from gatdist.config.loading import (
    first_error,
    load_config,
    parse_config,
    preset_names,
    read_toml,
    require_unchanged,
    set_value,
    unicode_encoding,
)
from gatdist.config.models import Config, flatten
from gatdist.config.schedule import Schedule
from gatdist.config.sections import (
    BOTH,
    BatchNormStatistics,
    ClusterConfig,
    ConvergenceConfig,
    DataConfig,
    EvaluateConfig,
    GameConfig,
    HealthConfig,
    LatentDistribution,
    NamedConfig,
    PenaltyConfig,
    PlayerName,
    PlayerOptimConfig,
    RunConfig,
    Section,
    TermConfig,
)

__all__ = [
    "BOTH",
    "REFERENCE",
    "BatchNormStatistics",
    "ClusterConfig",
    "Config",
    "ConvergenceConfig",
    "DataConfig",
    "EvaluateConfig",
    "GameConfig",
    "HealthConfig",
    "LatentDistribution",
    "NamedConfig",
    "PenaltyConfig",
    "PlayerName",
    "PlayerOptimConfig",
    "RunConfig",
    "Schedule",
    "Section",
    "TermConfig",
    "cache_folder",
    "cuda_variables",
    "env_values",
    "expand_env",
    "first_error",
    "flatten",
    "import_plugins",
    "is_secret",
    "load_config",
    "parse_config",
    "preset_names",
    "read_toml",
    "redact_url",
    "require_deterministic_workspace",
    "require_unchanged",
    "set_cuda_variables",
    "set_env",
    "set_value",
    "silence_profiler",
    "unicode_encoding",
]
