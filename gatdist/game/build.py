"""A run's task, and networks of the shapes that it gives them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gatdist.common.errors import ConfigError, PluginError
from gatdist.common.registry import call_with_options, user_code
from gatdist.config import Config
from gatdist.game.task_contract import examine_task
from gatdist.game.tasks import (
    Draws,
    Record,
    Shape,
    Task,
    is_built_in,
    shapes_of_data,
    taken_by,
    tasks,
)
from gatdist.models import build_networks


@dataclass(frozen=True)
class Shapes:
    """Shapes of one sample in a task.

    Attributes:
        target: Of what the generator makes.
        inputs: Of the generator's inputs besides latents.
        shown: Of the discriminator's input.
        names: Of the inputs: their fields, or ``input_0``, … of those that are no field.
    """

    target: Shape
    inputs: tuple[Shape, ...]
    shown: Shape
    names: tuple[str, ...]

    @classmethod
    def of(cls, task: Task, sample_shape: Shape, metadata: Mapping[str, Any]) -> Shapes:
        """Find the shapes out with one sample.

        Args:
            task: Of the run.
            sample_shape: Of the data's samples.
            metadata: Of the samples, with the shapes of their further fields.

        Raises:
            ConfigError: The data lacks a field, or has two of the target's name.
            PluginError: A user's task fails.
        """
        if task.target in metadata.get("fields", {}):
            rule = f"generates the field {task.target!r}, which is a further field of the data"
            hint = "Pack or index the data with this field as target"
            raise ConfigError("game.task", rule, value=type(task).__name__, hint=hint)
        shapes = shapes_of_data(task, sample_shape, metadata)
        data = Record({name: torch.zeros(1, *shape) for name, shape in shapes.items()})
        drawn = Draws(0, "", torch.zeros(1, dtype=torch.int64))
        with user_code("game.task", "fails with a sample of zeros", value=type(task).__name__):
            found = Record(task.prepare(data, drawn))
            inputs, shown = task.inputs(found), task.shown(found)
        return cls(
            tuple(found[task.target].shape[1:]),
            tuple(tuple(each.shape[1:]) for each in inputs),
            tuple(shown.shape[1:]),
            tuple(
                next((name for name, field in found.items() if field is each), f"input_{i}")
                for i, each in enumerate(inputs)
            ),
        )


def build_networks_of(
    config: Config,
    task: Task,
    sample_shape: Shape,
    num_classes: int,
    metadata: Mapping[str, Any],
) -> tuple[nn.Module, nn.Module]:
    """Build the configured networks for a task; see :func:`gatdist.models.build_networks`."""
    shapes = Shapes.of(task, sample_shape, metadata)
    return build_networks(
        config,
        shapes.target,
        num_classes,
        metadata,
        inputs=shapes.inputs,
        shown=shapes.shown,
        takes_latents=task.takes_latents,
    )


def build_task(config: Config, sample_shape: Shape, metadata: Mapping[str, Any]) -> Task:
    """Build the task that ``game.task`` names, and check that of a user on the CPU.

    Args:
        config: Of the run.
        sample_shape: Of the data's samples.
        metadata: Of the samples; the task gets what it takes of them.

    Raises:
        ConfigError: It is unknown, or an option does not fit.
        PluginError: A user's task is no task, or fails in its constructor.
    """
    name = config.game.task.name
    kind: Any = tasks[name]
    if not isinstance(kind, type) or not issubclass(kind, Task):
        raise PluginError("game.task", "must be a subclass of gatdist.Task", value=name)
    given = taken_by(kind, metadata, config.game.task.options, "game.task")
    with user_code("game.task", "fails in its constructor", value=name):
        task: Task = call_with_options(kind, config.game.task.options, "game.task", **given)
    if not is_built_in(task):
        examine_task(name, task, sample_shape, metadata)
    return task
