"""What a run can guarantee with networks that have hidden state."""

from __future__ import annotations

from collections.abc import Mapping

from gatdist.common.errors import ConfigError, PluginError
from gatdist.config import Config, PlayerName
from gatdist.game.hidden import Traits


def require_exact(config: Config, traits: Mapping[PlayerName, Traits]) -> list[str]:
    """Refuse hidden state that a setting excludes; what people should know of the rest.

    Args:
        config: of the run.
        traits: from :func:`gatdist.game.contract.examine`.

    Returns:
        Warnings, each of which says what is not guaranteed.

    Raises:
        ConfigError: a setting excludes what a network does.
        PluginError: ``run.reduction = "canonical"`` can't be kept.
    """
    warnings: list[str] = []
    for player, found in traits.items():
        name = getattr(config.model, player).name
        whose = f"model.{player}.name = {name!r}"
        warnings += found.warnings
        hidden = [f"its attribute {each!r}" for each in found.attributes]
        if found.is_erratic and not hidden:
            hidden = ["something that gatdist can't see (a generator, a global, a clock)"]
        if hidden and config.run.reduction == "canonical":
            raise PluginError(
                f"model.{player}.name",
                f"a forward changes {hidden[0]}, which is neither in checkpoints nor shared by the "
                "workers, as run.reduction = 'canonical' needs",
                value=name,
                hint="Keep state in buffers, and draw from torch's default generator",
            )
        if hidden:
            warnings.append(
                f"{whose}: a forward changes {hidden[0]}, which is neither in checkpoints nor "
                "shared by the workers: a resumed run, or one with other workers, may differ. Keep "
                "state in buffers, and draw from torch's default generator"
            )
        if found.generators:
            drawn = " and ".join(found.generators)
            message = (
                f"{whose} draws from {drawn}, which is seeded by run.seed and the samples seen"
            )
            if config.run.reduction == "fast":
                message += (
                    ": the same number of workers and micro-batch give the same run, others give "
                    "other draws. For independence of both use an attribute noise_size, or "
                    "run.reduction = 'canonical'"
                )
                warnings.append(message)
        if found.buffers and config.run.reduction == "fast":
            warnings.append(
                f"{whose}: a forward changes the buffer {found.buffers[0]!r}"
                + (f" and {len(found.buffers) - 1} more" if len(found.buffers) > 1 else "")
                + ". After each phase such buffers become the mean over the phase's forwards and "
                "all workers, which depends on how the batch is divided"
            )
        _require_recordable(config, player, found)
    return warnings


def _require_recordable(config: Config, player: PlayerName, found: Traits) -> None:
    state = [*found.generators, *found.attributes]
    if config.precision.cuda_graphs and state:
        raise ConfigError(
            "precision.cuda_graphs",
            f"the {player}'s forward draws from or changes {state[0]}, which a recorded step "
            "would not do again",
            value=True,
            hint="Leave it out",
        )
    if player in config.precision.compile and found.buffers:
        raise ConfigError(
            "precision.compile",
            f"the {player}'s forward changes the buffer {found.buffers[0]!r}",
            value=player,
            hint="Leave this network out",
        )
