"""The contract of users' tasks, checked with a few samples before a run.

``docs/how-to/own-game.md`` has it as a table.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, NoReturn

import torch
from torch import Tensor

from gatdist.common.errors import PluginError
from gatdist.common.registry import user_code
from gatdist.common.seeding import generator_states
from gatdist.game.tasks import Draws, Fields, Record, Shape, Task, shapes_of_data
from gatdist.models.structure import dtype_name
from gatdist.parallel import draws

# Samples are identified by numbers. Rows of the same number must be equal.
_SAMPLES, _OTHERS, _ALONE = [0, 1], [0, 7], [0]
_CPU = torch.device("cpu")
_ROUNDING = 1e-5  # relative


def random_fields(
    task: Task,
    shapes: Mapping[str, Shape],
    modality: str,
    positions: Tensor,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Return random fields of samples as data has them: one-hot, or uniform in (-1, 1)."""
    found = {}
    for name, shape in shapes.items():
        values = draws.uniform(0, f"contract/{name}", positions, shape, dtype)
        if name == task.target and modality in ("text", "tokens"):
            found[name] = (values == values.amax(1, keepdim=True)).to(dtype)
        else:
            found[name] = 2 * values - 1
    return found


def examine_task(name: str, task: Task, sample_shape: Shape, metadata: Mapping[str, Any]) -> None:
    """Call the functions of a user's task on the CPU, and compare what they return for a sample.

    Args:
        name: Of the task in the configuration.
        task: To be checked.
        sample_shape: Of the data's samples.
        metadata: Of the samples.

    Raises:
        ConfigError: The data lacks a field.
        PluginError: The task breaks the contract.
    """
    shapes = shapes_of_data(task, sample_shape, metadata)
    check = _TaskCheck(name, task, shapes, str(metadata.get("modality", "")))
    for is_training in (True, False):
        check.run(is_training)
    check.run_preview()


class _TaskCheck:
    def __init__(self, name: str, task: Task, shapes: Mapping[str, Shape], modality: str) -> None:
        self._name, self._task, self._shapes, self._modality = name, task, shapes, modality

    def run(self, is_training: bool) -> None:
        generators = generator_states(_CPU)
        first = self._outputs(_SAMPLES, is_training)
        self._require_gradient(is_training)
        for numbers in (_SAMPLES, _OTHERS, _ALONE):
            for key, other in self._outputs(numbers, is_training).items():
                if key not in first or not _near(first[key][0], other[0]):
                    self._refuse(
                        f"{key} of a sample must be a function of its fields and of the argument "
                        "'drawn'; found one that changes with the other samples or from call to "
                        "call",
                        "Draw by drawn.uniform(), drawn.normal() or drawn.integers()",
                    )
        if generator_states(_CPU) != generators:
            self._refuse(
                "draws from a shared random generator",
                "Draw by drawn.uniform(), drawn.normal() or drawn.integers()",
            )

    def run_preview(self) -> None:
        fields = self._prepared(_SAMPLES, is_training=False)
        with self._user_code("preview()"):
            columns = self._task.preview(fields, fields)
        if not isinstance(columns, Mapping):
            rule = "preview() must return a dictionary of fields to show"
            self._refuse(f"{rule}; found {type(columns).__name__}")
        target = fields[self._task.target]
        for key, column in columns.items():
            self._require(f"the column {key!r} of preview()", column, len(_SAMPLES))
            if self._modality == "image" and (column.ndim != 4 or column.shape[1] not in (1, 3)):
                expected = "images [n, 1 or 3, height, width]"
            elif self._modality == "audio" and column.shape != target.shape:
                expected = f"audio of the target's shape, {list(target.shape)}"
            else:
                continue
            rule = f"the column {key!r} of preview() must be {expected}"
            self._refuse(f"{rule}; found {list(column.shape)}")

    def _prepared(self, numbers: list[int], is_training: bool) -> Record:
        positions = torch.tensor(numbers)
        given = random_fields(
            self._task, self._shapes, self._modality, positions, torch.get_default_dtype()
        )
        drawn = Draws(0, "", positions, is_training)
        with self._user_code("prepare()"):
            fields = self._task.prepare(Record(given), drawn)
        if not isinstance(fields, Mapping):
            self._refuse(f"prepare() must return a dictionary; found {type(fields).__name__}")
        for key, field in fields.items():
            self._require(f"the field {key!r} of prepare()", field, len(numbers))
        if self._task.target not in fields:
            rule = f"prepare() must return the field {self._task.target!r}, which is generated"
            self._refuse(f"{rule}; found {', '.join(map(repr, fields)) or 'nothing'}")
        return Record(fields)

    def _outputs(self, numbers: list[int], is_training: bool) -> dict[str, Tensor]:
        """Return the fields, the generator's inputs, and what the discriminator is shown."""
        fields = self._prepared(numbers, is_training)
        with self._user_code("inputs()"):
            inputs = self._task.inputs(fields)
        if not isinstance(inputs, (list, tuple)):
            self._refuse(f"inputs() must return a tuple of tensors; found {type(inputs).__name__}")
        if not inputs and not self._task.takes_latents:
            self._refuse(
                "inputs() returns nothing, so that the generator would have no input",
                "Return fields, or set takes_latents = True",
            )
        found = {f"the field {key!r}": field for key, field in fields.items()}
        for i, field in enumerate(inputs):
            self._require(f"tensor {i} of inputs()", field, len(numbers))
            found[f"tensor {i} of inputs()"] = field
        return found | {"shown()": self._shown(fields, len(numbers))}

    def _shown(self, fields: Fields, n: int) -> Tensor:
        with self._user_code("shown()"):
            shown = self._task.shown(fields)
        self._require("the output of shown()", shown, n)
        return shown

    def _require_gradient(self, is_training: bool) -> None:
        fields = self._prepared(_SAMPLES, is_training)
        target = fields[self._task.target].detach().requires_grad_()
        if not self._shown(Record({**fields, self._task.target: target}), 2).requires_grad:
            self._refuse(
                f"shown() must depend on the field {self._task.target!r}, which is generated",
                "Leave out detach(), .data and conversions to NumPy",
            )

    def _require(self, what: str, value: object, n: int) -> None:
        expected = (
            f"{what} must be a finite floating-point tensor [{n}, …] on the device of the fields"
        )
        if not isinstance(value, Tensor):
            self._refuse(f"{expected}; found {type(value).__name__}")
        if value.shape[:1] != (n,) or not value.is_floating_point():
            self._refuse(f"{expected}; found {dtype_name(value.dtype)} {tuple(value.shape)}")
        if value.device != _CPU:
            self._refuse(f"{expected}; found one on {value.device}")
        if not value.isfinite().all():
            self._refuse(f"{expected}; found non-finite values (NaN or infinity)")

    def _user_code(self, function: str) -> AbstractContextManager[None]:
        return user_code("game.task", f"{function} fails", value=self._name)

    def _refuse(self, rule: str, hint: str = "") -> NoReturn:
        raise PluginError("game.task", rule, value=self._name, hint=hint)


def _near(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    return bool((a - b).abs().max() <= _ROUNDING * (a.abs().max() + 1e-6)) if a.numel() else True
