"""The contract of users' networks, checked with a few samples before a run.

``docs/how-to/own-networks.md`` has it as a table.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from gatdist.common.errors import PluginError
from gatdist.common.registry import user_code
from gatdist.common.seeding import generator_states, generators_kept, seed_all
from gatdist.config import Config, PlayerName
from gatdist.game.exactness import couplings
from gatdist.game.hidden import Traits, attribute_states, changed, equal
from gatdist.game.scores import parse
from gatdist.game.task_contract import random_fields
from gatdist.game.tasks import Draws, Fields, Shape, Task, shapes_of_data
from gatdist.models import COMPUTE_DTYPES, DTYPES, is_built_in
from gatdist.models.buffers import BatchNorm
from gatdist.models.layers import latents_from
from gatdist.models.structure import dtype_name
from gatdist.parallel import draws

# Samples are identified by numbers. A call takes two; a part of a batch may have any number.
_SAMPLES, _OTHER_SAMPLES = [0, 1], [7, 8]
# Relative tolerance of two equal outputs, by dtype.
_ROUNDING = {torch.bfloat16: 5e-2, torch.float16: 1e-2, torch.float64: 1e-9}
# Images and audio lie in about [-1, 1]; untrained networks without tanh go a little beyond.
_MAX_VALUE = 10.0


def examine(
    config: Config,
    networks: Mapping[PlayerName, nn.Module],
    task: Task,
    sample_shape: tuple[int, ...],
    num_classes: int,
    metadata: Mapping[str, Any],
) -> dict[PlayerName, Traits]:
    """Check users' networks (bare, on their device) and return the traits of all networks.

    Works on copies and restores all random generators. A network that couples samples gets the
    attribute ``couples_samples = True``.

    Args:
        config: Of the run.
        networks: Of both players.
        task: Of the run; makes the networks' inputs.
        sample_shape: Of the data.
        num_classes: Of the data; 0 if unlabelled.
        metadata: Of the data's samples.

    Raises:
        PluginError: A network breaks the contract.
    """
    classes = num_classes if config.model.conditional else 0
    modality = str(metadata.get("modality", ""))
    fields = shapes_of_data(task, sample_shape, metadata)
    found: dict[PlayerName, Traits] = {}
    for player, network in networks.items():
        if is_built_in(config, player):
            found[player] = Traits(synchronized=_batch_norm_buffers(network))
            continue
        with generators_kept():
            check = _NetworkCheck(config, player, network, task, fields, classes, modality)
            found[player] = check.traits()
    return found


def _batch_norm_buffers(network: nn.Module) -> tuple[str, ...]:
    return tuple(
        key
        for prefix, module in network.named_modules()
        if isinstance(module, BatchNorm)
        for key, _ in module.named_buffers(prefix, recurse=False)
    )


@dataclass
class _NetworkCheck:
    """The checks of one network on its device; each raises PluginError if it fails.

    ``fields`` are the shapes of the data's fields; ``num_classes`` is 0 for an unconditional
    network, ``modality`` is "" if unknown.
    """

    config: Config
    player: PlayerName
    original: nn.Module
    task: Task
    fields: Mapping[str, Shape]
    num_classes: int
    modality: str

    def __post_init__(self) -> None:
        self.field = f"model.{self.player}.name"
        self.name = getattr(self.config.model, self.player).name
        self.device = next(self.original.parameters()).device
        self.dtype = DTYPES[self.config.precision.dtype]
        self.compute = COMPUTE_DTYPES.get(self.config.precision.dtype)
        hint = "Hold tensors as parameters or buffers"
        if any("weight_g" in name for name, _ in self.original.named_parameters()):
            hint = "Use torch.nn.utils.parametrizations.weight_norm"
        with self._user_code("cannot be copied by copy.deepcopy", hint):
            self.network = copy.deepcopy(self.original)
        self._parameters = dict(self.original.named_parameters())
        self._buffers = dict(self.original.named_buffers())
        self._persistent = self.original.state_dict().keys()
        self._warnings: list[str] = []
        seed_all(0, "contract", 0)
        self._seeded = generator_states(self.device)

    def traits(self) -> Traits:
        """Run all checks."""
        with self._user_code("train() fails"):
            self.network.train()
        traits = self._check_state(self._check_backward())
        declared = couplings(self.network)
        if not declared:
            if self._is_coupled(bool(traits.generators)):
                self.original.couples_samples = True  # type: ignore[assignment]
            self.network.train()
        groups = [found.group for found in declared if found.group]
        if groups and len(groups) == len(declared) and not traits.generators:
            self._check_groups(math.lcm(*groups))
        self._check_evaluation_mode()
        return replace(traits, warnings=tuple(self._warnings))

    def _prepared(self, positions: Tensor, is_training: bool) -> Fields:
        """Return the fields of random samples."""
        found = random_fields(self.task, self.fields, self.modality, positions, self.dtype)
        return self.task.prepare(found, Draws(0, "", positions, is_training))

    def _inputs(self, numbers: list[int], is_training: bool) -> tuple[list[Tensor], Any]:
        """Return latents, fields or what the discriminator is shown; then labels and noise."""
        positions = torch.tensor(numbers, device=self.device)
        labels = None
        if self.num_classes:
            labels = draws.integers(0, "contract/labels", positions, self.num_classes)
        fields = self._prepared(positions, is_training)
        self._shape = tuple(fields[self.task.target].shape[1:])
        inputs = []
        if self.player == "discriminator":
            inputs = [self.task.shown(fields).detach()]
        else:
            if self.task.takes_latents:
                shape = (self.config.model.latent_size,)
                normal = draws.normal(0, "contract/latents", positions, shape, self.dtype)
                inputs = [latents_from(normal, self.config.model.latent_distribution)]
            inputs += self.task.inputs(fields)
        return inputs, (
            labels,
            *draws.of_network(self.network, 0, "contract", positions, self.dtype),
        )

    def _call(self, numbers: list[int], *, in_training: bool = True) -> Tensor:
        """Return the checked output, from the original buffers and a fixed seed.

        Of an output of several tensors, their values side by side, [n, …].
        """
        for name, tensor in self.network.named_buffers():
            if name in self._persistent and name in self._buffers:
                tensor.data = self._buffers[name].clone()
        seed_all(0, "contract", 0)
        inputs, (labels, *noise) = self._inputs(numbers, in_training)
        for tensor in inputs:
            tensor.requires_grad_(in_training and self.player == "discriminator")
        label = "None" if labels is None else _kind(labels)
        mode = "training" if in_training else "evaluation"
        what = f"{', '.join(map(_kind, inputs))}, labels {label}{' and noise' if noise else ''}"
        autocast = torch.autocast(self.device.type, self.compute) if self.compute else nullcontext()
        with self._user_code(f"forward fails, called with {what} in {mode} mode"), autocast:
            out = self.network(*inputs, labels, *noise)
        tensors = self._tensors(out, len(numbers), in_training)
        if len(tensors) == 1:
            return tensors[0]
        return torch.cat([tensor.reshape(len(tensor), -1) for tensor in tensors], 1)

    def _tensors(self, out: Any, n: int, in_training: bool) -> list[Tensor]:
        """Return the tensors of an output, that of the generated field first."""
        if self.player == "generator":
            what, shape = "samples", (n, *self._shape)
            others = dict(out) if isinstance(out, dict) else {}
            first, rest = others.pop(self.task.target, out), list(others.values())
        else:
            what, shape = "one logit per sample", (n,)
            maps, features = parse(out) or ((out,), ())
            first, *rest = maps
            if isinstance(out, (list, tuple)) and isinstance(first, Tensor):
                shape = (n, *first.shape[1:])
            rest += [feature for part in features for feature in part]
        expected = f"must return {what}, a floating-point tensor {shape} on {self.device}"
        if not isinstance(first, Tensor):
            self._refuse(f"{expected}; found {_kinds(first)}", self._hint)
        for tensor in (first, *rest):
            if not isinstance(tensor, Tensor) or tensor.shape[:1] != (n,):
                self._refuse(
                    f"must return tensors whose first axis is the {n} samples; found "
                    f"{_kinds(tensor)}",
                    self._hint,
                )
            fits = tensor.is_floating_point() and tensor.device == self.device
            if tensor is first:
                fits = fits and tuple(tensor.shape) == shape
            if not fits or tensor.layout != torch.strided:
                found = f"{_kind(tensor)} on {tensor.device}"
                self._refuse(f"{expected}; found {found}", self._hint)
            if not tensor.isfinite().all():
                self._refuse(f"{expected}; found non-finite values (NaN or infinity)")
            if in_training and not tensor.requires_grad:
                self._refuse(
                    f"{expected} that depends on its parameters; found one without a gradient",
                    "Leave out detach(), .data, torch.no_grad() and conversions to NumPy",
                )
        return [first, *rest]

    @property
    def _hint(self) -> str:
        if self.player == "generator":
            return ""
        return "Return maps of logits in a list, or lists of features with the logits last"

    def _check_backward(self) -> Traits:
        """Find out which random generators are used and which parameters are not."""
        out = self._call(_SAMPLES)
        if self.player == "generator":
            self._warn_of_values(out.detach())
        with self._user_code("backward fails"):
            out.float().square().mean().backward()
        drawn = self._drawn_from()
        unused = []
        for name, parameter in self.network.named_parameters():
            if not parameter.requires_grad:
                continue
            if parameter.grad is None:
                unused.append(name)
            elif self.compute is None and not parameter.grad.isfinite().all():
                self._refuse(f"the gradient of its parameter {name!r} is not finite")
            parameter.grad = None
        if unused:
            names = ", ".join(map(repr, unused[:3]))
            more = f" and {len(unused) - 3} more" if len(unused) > 3 else ""
            self._warn(
                f"the output does not depend on the parameters {names}{more}. Their gradient "
                "counts as zero"
            )
        may_skip = bool(unused or drawn or getattr(self.network, "may_skip_parameters", False))
        return Traits(generators=drawn, may_skip_parameters=may_skip)

    def _check_state(self, traits: Traits) -> Traits:
        """Find out which buffers and attributes a forward changes, by repeating calls."""
        outs, attributes, caches = [], [], []
        buffers = set[str]()
        for numbers in (_SAMPLES, _SAMPLES, _OTHER_SAMPLES, _SAMPLES):
            outs.append(self._call(numbers).detach())
            attributes.append(attribute_states(self.network))
            tensors = dict(self.network.named_buffers())
            state = self.network.state_dict().keys()
            persistent = {n: t for n, t in tensors.items() if n in state}
            buffers |= self._changed_buffers(persistent)
            caches.append({n: tensors[n].clone() for n in tensors.keys() - persistent.keys()})
        for name, tensor in caches[-1].items():
            # The first forward may fill it.
            if not all(name in cache and equal(cache[name], tensor) for cache in caches):
                self._refuse(
                    f"forward changes the buffer {name!r}, which is not persistent and so is in "
                    "no checkpoint",
                    "Register it with persistent=True",
                )
        for name, parameter in self.network.named_parameters():
            before = self._parameters.get(name)
            if before is None or not torch.equal(parameter, before):
                self._refuse(
                    f"forward changes the parameter {name!r}, which only the optimizer may change",
                    "Initialize parameters in the constructor, constrain them by a parametrization",
                )
        synchronized = _batch_norm_buffers(self.network)
        same = self._near(outs[0], outs[1]) and self._near(outs[1], outs[3])
        return replace(
            traits,
            buffers=tuple(sorted(buffers.difference(synchronized))),
            synchronized=synchronized,
            attributes=changed(attributes[0], attributes[1]),
            is_erratic=not same,
        )

    def _changed_buffers(self, buffers: Mapping[str, Tensor]) -> set[str]:
        """Names of the persistent buffers that the last forward changed."""
        names = set()
        for name, tensor in buffers.items():
            before = self._buffers.get(name)
            if before is None:
                self._refuse(f"forward creates the buffer {name!r}", "Create it in the constructor")
            if tensor.shape != before.shape:
                self._refuse(
                    f"forward changes the shape of the buffer {name!r}; expected "
                    f"{tuple(before.shape)}, found {tuple(tensor.shape)}"
                )
            if not equal(tensor, before):
                names.add(name)
        return names

    def _is_coupled(self, is_random: bool) -> bool:
        """Whether a sample's output depends on its neighbours or on their number."""
        if is_random:
            # Without dropout, or in evaluation mode if other draws remain: draws are a function of
            # the part of the batch, so their dependence on other samples is no coupling.
            for module in self.network.modules():
                if isinstance(module, (nn.modules.dropout._DropoutNd, nn.RReLU)):
                    module.eval()
            self._call([0, 1])
            is_random = bool(self._drawn_from())
            if is_random:
                self.network.eval()
        first, second = self._call([0, 1]).detach()
        first_again, second_again = self._call([0, 7]).detach()[0], self._call([7, 1]).detach()[1]
        if not self._near(first, first_again) or not self._near(second, second_again):
            return True
        if is_random:  # other numbers of samples draw other numbers
            return False
        try:
            return not self._near(first, self._call([0, 1, 7]).detach()[0])
        except PluginError:
            return True

    def _check_groups(self, group: int) -> None:
        """Refuse groups that are not as declared: of 2 · ``group`` samples, even and odd ones."""
        numbers = list(range(2 * group))
        others = [n + n % 2 * len(numbers) for n in numbers]
        first, second = (self._call(each).detach()[::2] for each in (numbers, others))
        if not self._near(first, second):
            self._refuse(
                f"declares couples_samples = {group}, but a sample depends on others than those of "
                f"its group: of n samples, i and j are in one group if i = j modulo n / {group}",
                "Split a batch by unflatten(0, (group, -1)), or declare couples_samples = True",
            )

    def _check_evaluation_mode(self) -> None:
        with self._user_code("eval() fails"):
            self.network.eval()
        with torch.no_grad():
            alone, several, again = (
                self._call(numbers, in_training=False) for numbers in ([0], [0, 1, 7], [0])
            )
        if self.player != "generator":
            return
        if not self._near(alone, again):
            self._refuse(
                "the output in evaluation mode depends on earlier calls; expected a function of "
                "latents, labels and noise",
                "Change state in training mode only",
            )
        if self._drawn_from():
            self._warn(
                "draws random numbers in evaluation mode. Samples are generated one by one, so "
                "that each is a function of its number. The attribute noise_size is faster"
            )
        elif not self._near(alone[0], several[0]):
            self._warn(
                "a sample in evaluation mode depends on the others of its batch. The output of "
                "gatdist sample depends on the number of samples"
            )

    def _warn_of_values(self, out: Tensor) -> None:
        if out.shape[1:] != self._shape:  # several tensors
            return
        largest = float(out.abs().max())
        if self.modality in ("image", "audio") and largest > _MAX_VALUE:
            self._warn(
                f"returns values up to {largest:.3g}, but {self.modality} samples lie in [-1, 1]. "
                "End it with a tanh, or scale its output"
            )
        if self.modality in ("text", "tokens"):
            sums = out.sum(1)
            if float(out.min()) < 0 or not torch.allclose(sums, torch.ones_like(sums), atol=0.05):
                self._warn(
                    "does not return probabilities over the vocabulary (axis 1). End it with a "
                    "softmax"
                )

    def _drawn_from(self) -> tuple[str, ...]:
        """Names of the random generators used since the start of the last call."""
        states = generator_states(self.device)
        return tuple(name for name, state in self._seeded.items() if state != states[name])

    def _near(self, a: Tensor, b: Tensor) -> bool:
        """Whether two outputs are equal within rounding."""
        if self.device.type == "cpu" and a.shape == b.shape and torch.equal(a, b):
            return True
        tolerance = _ROUNDING.get(self.compute or self.dtype, 1e-5)
        return bool(((a - b).abs().max() <= tolerance * (a.abs().max() + 1e-6)).item())

    def _user_code(self, doing: str, hint: str = "") -> AbstractContextManager[None]:
        return user_code(self.field, doing, value=self.name, hint=hint)

    def _refuse(self, rule: str, hint: str = "") -> NoReturn:
        raise PluginError(self.field, rule, value=self.name, hint=hint)

    def _warn(self, message: str) -> None:
        self._warnings.append(f"{self.field} = {self.name!r}: {message}")


def _kinds(value: object) -> str:
    found = _kind(value)
    if isinstance(value, (list, tuple, dict)):
        values = value.values() if isinstance(value, dict) else value
        found += f" of {', '.join(map(_kind, values)) or 'nothing'}"
    return found


def _kind(value: object) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{dtype_name(value.dtype)} {tuple(value.shape)}"
