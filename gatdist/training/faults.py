"""Whether an error of a run is the user's, who then reads what to change."""

from __future__ import annotations

import torch

from gatdist.common.errors import ConfigError, GatdistError, Interruption, PluginError
from gatdist.common.numerics import nondeterministic_operator
from gatdist.common.registry import described, is_machines_fault, users_frame
from gatdist.config import BOTH, Config
from gatdist.models import is_built_in


def attributed(error: BaseException, config: Config, device: torch.device) -> BaseException:
    """Return the error to raise for one that a run has raised.

    It is ConfigError or PluginError if the user's configuration or code has caused one that does
    not say so; else ``error``.
    """
    if operator := nondeterministic_operator(error):
        rule = f"needs deterministic operators; on {device}, {operator} has no such kernel"
        hint = "Use another operator in your network, or run.reduction = 'fast'"
        return ConfigError("run.reduction", rule, value="canonical", hint=hint)
    if isinstance(error, (GatdistError, KeyboardInterrupt, Interruption)):
        return error
    is_users = users_frame(error, config.plugins) is not None
    if is_machines_fault(error) or not (is_users or _has_user_code(config)):
        return error
    rule = f"failed during the run ({described(error)})"
    if not is_users:
        rule += ", perhaps by a value that a network, loss or rule returned"
    hint = "gatdist train --local --debug prints the whole traceback"
    return PluginError("user code", rule, hint=hint)


def _has_user_code(config: Config) -> bool:
    return bool(config.plugins) or not all(is_built_in(config, player) for player in BOTH)
