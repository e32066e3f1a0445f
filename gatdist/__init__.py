"""Generative adversarial networks, trained by gradient descent, on one machine or many."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from gatdist.common.version import __version__ as __version__

if TYPE_CHECKING:
    from gatdist.api import (
        apply,
        evaluate,
        export,
        import_weights,
        index,
        load,
        pack,
        sample,
        statistics,
        train,
        verify,
    )
    from gatdist.common.errors import GatdistError
    from gatdist.common.heartbeat import beat
    from gatdist.config import Config, load_config
    from gatdist.evaluation import register_feature_extractor
    from gatdist.game import (
        Context,
        Draws,
        Task,
        Term,
        register_loss,
        register_task,
        register_term,
        register_update_rule,
    )
    from gatdist.models import register_discriminator, register_generator

# Imported on first use: `import gatdist` and `gatdist --help` must not wait for torch.
_HOMES = {
    "Config": "gatdist.config",
    "Context": "gatdist.game",
    "Draws": "gatdist.game",
    "GatdistError": "gatdist.common.errors",
    "Task": "gatdist.game",
    "Term": "gatdist.game",
    "apply": "gatdist.api",
    "beat": "gatdist.common.heartbeat",
    "evaluate": "gatdist.api",
    "export": "gatdist.api",
    "import_weights": "gatdist.api",
    "index": "gatdist.api",
    "load": "gatdist.api",
    "load_config": "gatdist.config",
    "pack": "gatdist.api",
    "register_discriminator": "gatdist.models",
    "register_feature_extractor": "gatdist.evaluation",
    "register_generator": "gatdist.models",
    "register_loss": "gatdist.game",
    "register_task": "gatdist.game",
    "register_term": "gatdist.game",
    "register_update_rule": "gatdist.game",
    "sample": "gatdist.api",
    "statistics": "gatdist.api",
    "train": "gatdist.api",
    "verify": "gatdist.api",
}

__all__ = [
    "Config",
    "Context",
    "Draws",
    "GatdistError",
    "Task",
    "Term",
    "apply",
    "beat",
    "evaluate",
    "export",
    "import_weights",
    "index",
    "load",
    "load_config",
    "pack",
    "register_discriminator",
    "register_feature_extractor",
    "register_generator",
    "register_loss",
    "register_task",
    "register_term",
    "register_update_rule",
    "sample",
    "statistics",
    "train",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'gatdist' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
