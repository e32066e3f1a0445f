"""The contract of users' networks, checked with a few samples before a run.

:func:`examine` is the one check: ``gatdist train`` (``--local``, Ray, ``--dry-run``),
:func:`gatdist.train` and every worker call it. It works on copies and leaves all random generators
as they were. ``docs/own-networks.md`` has the contract as a table.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from gatdist.common.errors import PluginError
from gatdist.common.registry import user_code
from gatdist.common.seeding import generator_states, generators_kept, seed_all
from gatdist.config import Config, PlayerName
from gatdist.game.coupling import coupling_layer
from gatdist.game.hidden import Traits
from gatdist.game.snapshots import attribute_states, changed, equal
from gatdist.models import COMPUTE_DTYPES, DTYPES, is_built_in
from gatdist.models.structure import dtype_name
from gatdist.parallel import draws

# Samples of a call; a part of a batch may have any number.
_NUM_SAMPLES = 2
# Relative differences that rounding may make.
_ROUNDING = {torch.bfloat16: 5e-2, torch.float16: 1e-2, torch.float64: 1e-9}
# Images and audio lie in about [-1, 1]; untrained networks without tanh go a little beyond.
_LARGEST = 10.0


@dataclass(frozen=True)
class Samples:
    """What the networks are to fit.

    Attributes:
        shape: of one sample.
        num_classes: that the networks are conditioned on; 0 if they are not.
        modality: ``image``, ``audio``, ``text``, ``tokens``, ``points``, or "" if not known.
    """

    shape: tuple[int, ...]
    num_classes: int
    modality: str = ""


def examine(
    config: Config,
    networks: Mapping[PlayerName, nn.Module],
    sample_shape: tuple[int, ...],
    num_classes: int,
    metadata: Mapping[str, Any] = MappingProxyType({}),
) -> dict[PlayerName, Traits]:
    """Check the contract of networks that do not come with gatdist.

    A network that couples samples without saying so gets ``couples_samples = True``.

    Args:
        config: of the run.
        networks: bare, on their device; they are not changed.
        sample_shape: of one sample.
        num_classes: of the data; 0 if unlabelled.
        metadata: what else is known of the samples.

    Returns:
        What was found out, by player.

    Raises:
        PluginError: a network breaks the contract; it, what was expected and what was found are
            named.
        ConfigError: a setting excludes what a network does.
    """
    classes = num_classes if config.model.conditional else 0
    samples = Samples(sample_shape, classes, str(metadata.get("modality", "")))
    found: dict[PlayerName, Traits] = {}
    for player, network in networks.items():
        if is_built_in(config, player):
            changing = [n for n, m in _batch_norms(network) if n]
            found[player] = Traits(synchronized=tuple(changing))
            continue
        with generators_kept():
            found[player] = _Examination(config, player, network, samples).traits()
        if found[player].is_coupled:
            network.couples_samples = True  # type: ignore[assignment]
    return found


def _batch_norms(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The buffers that batch normalization changes, by name, each with its layer."""
    for prefix, module in network.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for key, _ in module.named_buffers(prefix, recurse=False):
                yield key, module


class _Examination:
    """Of one network.

    Args:
        config: of the run.
        player: whose network it is.
        network: on its device.
        samples: that it must fit.
    """

    def __init__(
        self, config: Config, player: PlayerName, network: nn.Module, samples: Samples
    ) -> None:
        self.config, self.player, self.original, self.samples = config, player, network, samples
        self.name = getattr(config.model, player).name
        self.device = next(network.parameters()).device
        self.dtype = DTYPES[config.precision.dtype]
        self.compute = COMPUTE_DTYPES.get(config.precision.dtype)
        hint = "Hold tensors as parameters or buffers"
        if any("weight_g" in name for name, _ in network.named_parameters()):
            hint = "Use torch.nn.utils.parametrizations.weight_norm"
        with self._user_code("can't be copied by copy.deepcopy", hint):
            self.network = copy.deepcopy(network)
        self._buffers = dict(network.named_buffers())
        self._persistent = network.state_dict().keys()
        self._warnings: list[str] = []

    def traits(self) -> Traits:
        """Run the checks, each of which raises PluginError where it fails."""
        with self._user_code("can't be set to training mode by train()"):
            self.network.train()
        found = self._differentiated()
        found = self._repeated(found)
        if coupling_layer(self.network) is None:
            with self._without_draws(bool(found.generators)) as is_random:
                found = replace(found, is_coupled=self._is_coupled(is_random))
            self.network.train()
        self._require_evaluation()
        return replace(found, warnings=tuple(self._warnings))

    # What is called with what.

    def _inputs(self, numbers: list[int]) -> tuple[Any, ...]:
        """Of the samples with these numbers: latents or samples, labels, and noise if asked for."""
        positions = torch.tensor(numbers, device=self.device)
        labels = None
        if self.samples.num_classes:
            labels = draws.integers(0, "contract/labels", positions, self.samples.num_classes)
        if self.player == "generator":
            shape: tuple[int, ...] = (self.config.model.latent_size,)
            given = draws.normal(0, "contract/latents", positions, shape, self.dtype)
        else:
            shape = self.samples.shape
            given = draws.uniform(0, "contract/samples", positions, shape, self.dtype)
            if self.samples.modality in ("text", "tokens"):  # one-hot, [n, vocabulary, length]
                given = (given == given.amax(1, keepdim=True)).to(self.dtype)
            else:
                given = 2 * given - 1
        noise = draws.of_network(self.network, 0, "contract", positions, self.dtype)
        return given, labels, *noise

    def _call(self, numbers: list[int], *, in_training: bool = True) -> Tensor:
        """Output for these samples, from the first buffers and the same seeds; checked."""
        for name, tensor in self.network.named_buffers():
            if name in self._persistent and name in self._buffers:
                tensor.data = self._buffers[name].clone()
        seed_all(0, "contract", 0)
        inputs = self._inputs(numbers)
        given = inputs[0].requires_grad_(in_training and self.player == "discriminator")
        mode = "training" if in_training else "evaluation"
        shown = " and noise" * (len(inputs) > 2)
        label = "None" if inputs[1] is None else f"int64 {tuple(inputs[1].shape)}"
        what = f"{_kind(given)}, labels {label}{shown} in {mode} mode"
        with self._user_code(f"fails in its forward, called with {what}"):
            if self.compute is None:
                out = self.network(*inputs)
            else:
                with torch.autocast(self.device.type, self.compute):
                    out = self.network(*inputs)
        self._require_output(out, len(numbers), in_training)
        return out

    def _require_output(self, out: Any, n: int, in_training: bool) -> None:
        generates = self.player == "generator"
        shape = (n, *self.samples.shape) if generates else (n,)
        what = "samples" if generates else "one logit per sample"
        expected = f"must return {what}, a floating-point tensor {shape} on {self.device}"
        if not isinstance(out, Tensor):
            found = type(out).__name__
            if isinstance(out, (list, tuple, dict)):
                values = out.values() if isinstance(out, dict) else out
                found += f" of {', '.join(_kind(each) for each in values) or 'nothing'}"
            self._refuse(f"{expected}; found {found}")
        right = tuple(out.shape) == shape and out.is_floating_point() and out.device == self.device
        if not right or out.layout != torch.strided:
            self._refuse(f"{expected}; found {_kind(out)} on {out.device}")
        if not out.isfinite().all():
            self._refuse(f"{expected}; found values that are not finite (NaN or infinity)")
        if in_training and not out.requires_grad:
            self._refuse(
                f"{expected} that depends on its parameters; found one without a gradient",
                "Leave out detach(), .data, torch.no_grad() and conversions to NumPy",
            )

    # What is found out.

    def _differentiated(self) -> Traits:
        """Forward and backward: gradients and random generators."""
        seed_all(0, "contract", 0)
        seeded = generator_states(self.device)
        out = self._call([*range(_NUM_SAMPLES)])
        if self.player == "generator":
            self._look_at_values(out.detach())
        with self._user_code("fails in its backward"):
            out.float().square().mean().backward()
        after = generator_states(self.device)
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
            self._warnings.append(
                f"{self._whose}: its output does not depend on {_listed(unused)}, whose gradient "
                "counts as zero"
            )
        if getattr(self.network, "may_skip_parameters", False):
            unused = unused or ["may_skip_parameters"]
        drawn = tuple(name for name in seeded if seeded[name] != after[name])
        return Traits(generators=drawn, unused=tuple(unused))

    def _repeated(self, found: Traits) -> Traits:
        """The same input again, and after another: buffers, attributes and parameters changed."""
        first, second = [*range(_NUM_SAMPLES)], [*range(7, 7 + _NUM_SAMPLES)]
        outs, buffers, attributes = [], set[str](), []
        cached: dict[str, Tensor] = {}
        for i, numbers in enumerate((first, first, second, first)):
            outs.append(self._call(numbers).detach())
            buffers |= self._changed_buffers(cached, is_first=i == 0)
            attributes.append(attribute_states(self.network))
        theirs = dict(self.original.named_parameters())
        for name, parameter in self.network.named_parameters():
            if name not in theirs or not torch.equal(parameter, theirs[name]):
                self._refuse(
                    f"its forward changes the parameter {name!r}, which only optimizers may",
                    "Initialize parameters in the constructor, constrain them by a parametrization",
                )
        known = {name for name, _ in _batch_norms(self.network)}
        same = self._near(outs[0], outs[1]) and self._near(outs[1], outs[3])
        return replace(
            found,
            buffers=tuple(sorted(buffers - known)),
            synchronized=tuple(sorted(known)),
            attributes=changed(attributes[0], attributes[1]),
            is_erratic=not same,
        )

    def _changed_buffers(self, cached: dict[str, Tensor], *, is_first: bool) -> set[str]:
        """Names of the buffers that the last forward has changed."""
        names = set()
        for name, tensor in self.network.named_buffers():
            if name not in self._persistent:  # it may be filled once, as a cache
                is_new = is_first or (name in cached and equal(cached[name], tensor))
                cached[name] = tensor.clone()
                if not is_new:
                    self._refuse(
                        f"its forward changes the buffer {name!r}, which is not persistent and so "
                        "is in no checkpoint",
                        "Register it with persistent=True",
                    )
            elif name not in self._buffers:
                self._refuse(
                    f"its forward creates the buffer {name!r}", "Create it in the constructor"
                )
            elif tensor.shape != self._buffers[name].shape:
                before, now = tuple(self._buffers[name].shape), tuple(tensor.shape)
                self._refuse(
                    f"its forward changes the shape of the buffer {name!r}; expected {before}, "
                    f"found {now}"
                )
            elif not equal(tensor, self._buffers[name]):
                names.add(name)
        return names

    @contextmanager
    def _without_draws(self, is_random: bool) -> Iterator[bool]:
        """Without dropout, or if that is not enough in evaluation mode: what still is random.

        How many numbers are drawn for a sample may depend on the samples before it, which is no
        coupling: draws are a function of the part of the batch.
        """
        if is_random:
            for module in self.network.modules():
                if isinstance(module, (nn.modules.dropout._DropoutNd, nn.RReLU)):
                    module.eval()
            seed_all(0, "contract", 0)
            seeded = generator_states(self.device)
            self._call([0, 1])
            if is_random := seeded != generator_states(self.device):
                self.network.eval()
        yield is_random

    def _is_coupled(self, is_random: bool) -> bool:
        """Whether a sample's output depends on the sample beside it, or on how many there are."""
        alone, other = self._call([0, 1]).detach()
        after, before = self._call([0, 7]).detach()[0], self._call([7, 1]).detach()[1]
        if not self._near(alone, after) or not self._near(other, before):
            return True
        if is_random:  # it draws other numbers for another number of samples
            return False
        try:
            return not self._near(alone, self._call([0, 1, 7]).detach()[0])
        except PluginError:
            return True

    def _require_evaluation(self) -> None:
        """In evaluation mode any number of samples must do."""
        with self._user_code("can't be set to evaluation mode by eval()"):
            self.network.eval()
        seed_all(0, "contract", 0)
        seeded = generator_states(self.device)
        with torch.no_grad():
            alone, several, again = (
                self._call(numbers, in_training=False) for numbers in ([0], [0, 1, 7], [0])
            )
            draws_numbers = seeded != generator_states(self.device)
        if self.player != "generator":
            return
        if not self._near(alone, again):
            self._refuse(
                "in evaluation mode its output depends on earlier calls; expected a function of "
                "latents, labels and noise",
                "Change state in training mode only",
            )
        if draws_numbers:
            self._warnings.append(
                f"{self._whose} draws random numbers in evaluation mode too: samples are generated "
                "one by one, so that each is a function of its number; an attribute noise_size is "
                "faster"
            )
        elif not self._near(alone[0], several[0]):
            self._warnings.append(
                f"{self._whose}: in evaluation mode a sample depends on those beside it: what "
                "gatdist sample gives for a number depends on how many are asked for"
            )

    def _look_at_values(self, out: Tensor) -> None:
        modality, largest = self.samples.modality, float(out.abs().max())
        if modality in ("image", "audio") and largest > _LARGEST:
            self._warnings.append(
                f"{self._whose} returns values up to {largest:.3g}, but {modality} samples lie in "
                "[-1, 1]: end it with a tanh, or scale its output"
            )
        if modality in ("text", "tokens"):
            sums = out.sum(1)
            if float(out.min()) < 0 or not torch.allclose(sums, torch.ones_like(sums), atol=0.05):
                self._warnings.append(
                    f"{self._whose} returns no probabilities over the vocabulary (axis 1): end it "
                    "with a softmax"
                )

    def _near(self, a: Tensor, b: Tensor) -> bool:
        """Whether two outputs are equal within rounding; exactly, where nothing else is rounded."""
        if self.device.type == "cpu" and a.shape == b.shape and torch.equal(a, b):
            return True
        relative = _ROUNDING.get(self.compute or self.dtype, 1e-5)
        return bool(((a - b).abs().max() <= relative * (a.abs().max() + 1e-6)).item())

    @property
    def _whose(self) -> str:
        return f"model.{self.player}.name = {self.name!r}"

    @contextmanager
    def _user_code(self, doing: str, hint: str = "") -> Iterator[None]:
        with user_code(f"model.{self.player}.name", doing, value=self.name, hint=hint):
            yield

    def _refuse(self, rule: str, hint: str = "") -> NoReturn:
        raise PluginError(f"model.{self.player}.name", rule, value=self.name, hint=hint)


def _kind(value: object) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{dtype_name(value.dtype)} {tuple(value.shape)}"


def _listed(names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:3]))
    more = len(names) - 3
    return f"the parameters {shown} and {more} more" if more > 0 else f"the parameters {shown}"
