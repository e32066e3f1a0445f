"""What ``state.json`` of a checkpoint holds beside the tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gatdist.common.errors import CheckpointError

_MOST_SAMPLES = 2**62
_Count = Annotated[int, Field(ge=0, le=_MOST_SAMPLES)]
_Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True)


class _Evaluating(_Strict):
    """Values of a log interval."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, float | None] = Field(init=False)

    samples_seen: _Count


class _Order(_Strict):
    fingerprint: str


class _Convergence(_Strict):
    best: Annotated[float, Field(allow_inf_nan=False)] | None
    best_samples: _Count


class _Counted(_Strict):
    model_config = ConfigDict(extra="forbid")

    nonfinite: _Count
    spikes: _Count
    rollbacks: _Count


class _SavedState(_Strict):
    status: str
    reason: str
    samples_seen: _Count
    metrics: dict[str, Any]
    attempt: _Count
    evaluating: _Evaluating | None
    order: _Order
    samples: dict[str, Any]
    wall_time_s: _Seconds
    convergence: _Convergence
    rollbacks: _Count
    counted: _Counted
    unwritten_metrics: list[dict[str, Any]] = []


def require_saved_state(
    state: Mapping[str, Any], subject: str, named_samples: int | None = None
) -> None:
    """Refuse the state of a checkpoint that training could not have written.

    Args:
        state: the content of ``state.json``; what an evaluation added is part of it.
        subject: the file, for messages.
        named_samples: the clock as the folder's name tells it; None if it is not known.

    Raises:
        CheckpointError: names the first key that is missing or wrong.
    """
    try:
        _SavedState.model_validate(dict(state))
    except ValidationError as error:
        problem = error.errors()[0]
        key, rule = ".".join(map(str, problem["loc"])), problem["msg"]
        raise CheckpointError(
            f"{subject}: {key}",
            rule[0].lower() + rule[1:],
            hint="Another version of gatdist wrote it, or others did: choose another --run-dir",
        ) from None
    if named_samples not in (None, state["samples_seen"]):
        raise CheckpointError(
            f"{subject}: samples_seen",
            f"differs from the name of its folder, which says {named_samples}",
            value=state["samples_seen"],
            hint="Give the folder its own name again",
        )
