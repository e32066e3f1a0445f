"""Count what a training step asks of a GPU, operator by operator, from shapes alone.

Steps run on fake tensors, which have shapes but no values, so that no GPU is needed.
"""

from __future__ import annotations

import gc
import math
import sys
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

from gatdist.bench.cases import layout
from gatdist.config import BOTH, Config, PlayerName
from gatdist.game.build import build_networks_of, build_task
from gatdist.game.contract import examine
from gatdist.game.hidden import Traits
from gatdist.game.tasks import Task
from gatdist.models import DTYPES, is_built_in
from gatdist.monitor.statistics import Statistics
from gatdist.monitor.timing import PhaseTimer
from gatdist.nn import derivatives_of_gpus
from gatdist.parallel.batch import Batch
from gatdist.parallel.communicator import LocalCommunicator
from gatdist.training.state import TrainState
from gatdist.training.step import train_step

aten = torch.ops.aten

CPU = torch.device("cpu")
# Where schedules have moved from their start, so that the strength of an augmentation is not 0.
SAMPLES_SEEN = 2**20

# A convolution whose kernel is longer than this on every side (by number of sides) is the weight
# gradient of torch's double backward: its kernel is a whole feature map.
LARGEST_KERNEL = {1: 41, 2: 8, 3: 8}

# Operators of the documentation of torch.use_deterministic_algorithms (torch 2.13), and of
# "alertNotDeterministic" in ATen/native/cuda, that are nondeterministic on CUDA by default. Each
# adds with atomics, or writes to repeated indices in any order. cuDNN's convolutions depend on
# torch.backends.cudnn.deterministic instead, and are not listed.
NONDETERMINISTIC = frozenset(
    {
        "_adaptive_avg_pool2d_backward",
        "_adaptive_avg_pool3d_backward",
        "adaptive_max_pool2d_backward",
        "avg_pool3d_backward",
        "bincount",
        "cumsum",
        "fractional_max_pool2d_backward",
        "grid_sampler_2d_backward",
        "grid_sampler_3d_backward",
        "histc",
        "index_add",
        "index_add_",
        "index_copy",
        "index_copy_",
        "index_put",
        "index_put_",
        "_index_put_impl_",
        "_unsafe_index_put",
        "max_pool2d_with_indices_backward",
        "max_pool3d_with_indices_backward",
        "max_unpool2d",
        "median.dim",
        "nll_loss2d_forward",
        "put",
        "put_",
        "reflection_pad1d_backward",
        "reflection_pad2d_backward",
        "reflection_pad3d_backward",
        "replication_pad1d_backward",
        "replication_pad2d_backward",
        "replication_pad3d_backward",
        "scatter",
        "scatter_",
        "scatter_add",
        "scatter_add_",
        "scatter_reduce",
        "scatter_reduce_",
        "upsample_bicubic2d_backward",
        "upsample_bilinear2d_backward",
        "upsample_linear1d_backward",
        "upsample_trilinear3d_backward",
    }
)

# Operators without a kernel that are no views by their schema.
NO_KERNEL = frozenset(
    {
        "_unsafe_view",
        "empty",
        "empty_like",
        "empty_strided",
        "lift",
        "lift_fresh",
        "new_empty",
        "new_empty_strided",
    }
)
# Operators that overwrite their first argument without reading it.
OVERWRITING = frozenset({"_foreach_copy_", "_foreach_zero_", "copy_", "fill_", "zero_"})
COPIES = frozenset({"_foreach_copy_", "_to_copy", "copy_"})
# Operators that return values of a tensor to the host.
HOST_READS = frozenset({"_local_scalar_dense", "equal", "is_nonzero", "item"})

# A loop until some value changes would never end.
_MOST_READS = 10_000
_BLOCK = 512  # bytes: torch's caching allocator rounds up to it


@dataclass
class Costs:
    """What one step costs.

    Attributes:
        operators: Operators that launch kernels; not views and allocations.
        convolutions: Number of convolutions by kernel size and groups, and of their backwards.
        map_kernels: Convolutions with a kernel over :data:`LARGEST_KERNEL`.
        float64: Operators that read or write float64.
        copies: Copies between devices, the host included.
        cpu: Operators on the CPU alone.
        host_reads: Numbers that the host waits for.
        nondeterministic: Number of operators by name, of :data:`NONDETERMINISTIC`.
        bytes: Read and written by kernels, each operator by itself.
        peak_bytes: Largest sum of live tensors, with networks and optimizer states.
        flops: Of convolutions and matrix products; a multiplication and an addition are two.
        kernels: Number of operators by (dtype of the products, flops, bytes).
        where: By kind of finding and operator, the lines of gatdist that caused it; for findings in
            a backward, the line of the forward.
    """

    operators: int = 0
    convolutions: Counter[str] = field(default_factory=Counter)
    map_kernels: int = 0
    float64: int = 0
    copies: int = 0
    cpu: int = 0
    host_reads: int = 0
    nondeterministic: Counter[str] = field(default_factory=Counter)
    bytes: int = 0
    peak_bytes: int = 0
    flops: int = 0
    kernels: Counter[tuple[torch.dtype, int, int]] = field(default_factory=Counter)
    where: Counter[str] = field(default_factory=Counter)

    def table(self) -> dict[str, object]:
        """Return all counts as JSON values."""
        return {
            "operators": self.operators,
            "convolutions": sum(self.convolutions.values()),
            "map_kernels": self.map_kernels,
            "float64": self.float64,
            "copies": self.copies,
            "cpu": self.cpu,
            "host_reads": self.host_reads,
            "nondeterministic": dict(sorted(self.nondeterministic.items())),
            "gib": round(self.bytes / 2**30, 3),
            "peak_gib": round(self.peak_bytes / 2**30, 3),
            "tflop": round(self.flops / 1e12, 4),
            "by_kernel": dict(sorted(self.convolutions.items())),
        }


class CostMode(TorchDispatchMode):
    """Counts operators between :meth:`start` and the next call of it, and live bytes always.

    Args:
        device: Where steps run; what happens on the CPU is reported if it is another one.
        locates: Whether to find the lines that cause what should not be there.
    """

    def __init__(self, device: torch.device, *, locates: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device_type = device.type
        self._costs: Costs | None = None
        self._locates = locates
        self._num_read = 0
        self._live = 0
        self._references: dict[int, weakref.ref[Tensor]] = {}
        self._sharing: dict[int, int] = {}  # number of tensors by storage
        self._sizes: dict[int, int] = {}  # bytes by storage
        self._operators: dict[object, _Operator] = {}

    def start(self) -> Costs:
        """Count into new costs from now on, and return them."""
        self._costs = Costs(peak_bytes=self._live)
        self._num_read = 0
        return self._costs

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        kwargs = kwargs or {}
        operator = self._operators.get(func)
        if operator is None:
            operator = self._operators[func] = _Operator(func)
        if operator.name in HOST_READS:
            return self._read(operator, args[0])
        if operator.name == "lift_fresh":
            # torch would keep the numbers, and frees them twice (torch 2.13).
            return aten.empty_like.default(args[0])
        # The fake device has no such kernel.
        out = None if operator.name == "_fused_sgd_" else func(*args, **kwargs)
        outputs = list(_tensors((out,)))
        for tensor in outputs:
            self._track(tensor)
        if self._costs is not None and operator.has_kernel:
            self._count(self._costs, operator, args, kwargs, out, outputs)
        return out

    def _read(self, operator: _Operator, tensor: Tensor) -> object:
        """Count a number that the host reads, and return a stand-in: 1 or true."""
        self._num_read += 1
        if self._num_read > _MOST_READS:
            raise RuntimeError(f"more than {_MOST_READS:,} numbers are read in a step")
        if self._costs is not None and self._is_here(tensor):
            self._costs.host_reads += 1
            self._note(self._costs, "host read", operator)
        if operator.name in ("equal", "is_nonzero") or tensor.dtype == torch.bool:
            return True
        return 1.0 if tensor.is_floating_point() or tensor.is_complex() else 1

    def _is_here(self, tensor: Tensor) -> bool:
        return tensor.device.type == self._device_type

    def _track(self, tensor: Tensor) -> None:
        """Count the bytes of a tensor's storage until the last tensor that shares it is freed.

        Not by weak references to the storage itself: torch 2.13 crashes in its destructor.
        """
        key = id(tensor)
        if key in self._references or not self._is_here(tensor):
            return
        storage = torch._C._storage_address(tensor)  # type: ignore[attr-defined]  # stubs lack it

        def freed(_: object) -> None:
            del self._references[key]
            self._sharing[storage] -= 1
            if not self._sharing[storage]:
                del self._sharing[storage]
                self._live -= self._sizes.pop(storage)

        self._references[key] = weakref.ref(tensor, freed)
        self._sharing[storage] = self._sharing.get(storage, 0) + 1
        if storage in self._sizes:
            return
        size = -(-tensor.numel() * tensor.element_size() // _BLOCK) * _BLOCK
        self._sizes[storage] = size
        self._live += size
        if self._costs is not None and self._live > self._costs.peak_bytes:
            self._costs.peak_bytes = self._live

    def _count(
        self,
        costs: Costs,
        operator: _Operator,
        args: Any,
        kwargs: Any,
        out: Any,
        outputs: list[Tensor],
    ) -> None:
        inputs = list(_tensors(args))
        if kwargs:
            inputs += _tensors(kwargs.values())
        devices = {t.device.type for t in inputs} | {t.device.type for t in outputs}
        if self._device_type not in devices:
            costs.cpu += 1
            self._note(costs, "CPU", operator)
            return
        if len(devices) > 1 and operator.name in COPIES:
            costs.copies += 1
            self._note(costs, "copy", operator)
        costs.operators += 1
        overwritten = len(list(_tensors(args[:1]))) if operator.name in OVERWRITING else 0
        written = operator.written(args)
        fresh = outputs if operator.returns_fresh else []
        moved = sum(map(_bytes, [*inputs[overwritten:], *written, *fresh]))
        costs.bytes += moved
        if any(t.dtype == torch.float64 and self._is_here(t) for t in (*inputs, *outputs)):
            costs.float64 += 1
            self._note(costs, "float64", operator)
        if operator.full_name in NONDETERMINISTIC or operator.name in NONDETERMINISTIC:
            costs.nondeterministic[operator.name] += 1
            self._note(costs, "nondeterministic", operator)
        flops = 0
        if operator.name in ("convolution", "convolution_backward"):
            flops = self._count_convolution(costs, operator, args, out)
        elif operator.name in _MATMULS:
            a, b = [t for t in inputs if t.dim() > 1][-2:]
            flops = 2 * a.numel() * b.shape[-1]
        elif operator.name == "pointwise":  # of gatdist.nn.fused
            flops = 2 * inputs[0].numel() * len(inputs[1])
        elif operator.name in _ATTENTIONS:
            count, num_shapes = _ATTENTIONS[operator.name]
            flops = count(*(t.shape for t in inputs[:num_shapes]))
        costs.flops += flops
        dtype = inputs[0].dtype if flops else torch.float32
        costs.kernels[dtype, flops, moved] += 1

    def _count_convolution(self, costs: Costs, operator: _Operator, args: Any, out: Any) -> int:
        if operator.name == "convolution":
            (inputs, weight), transposed, groups = args[:2], args[6], args[8]
            result, products = out, 1
        else:
            (result, inputs, weight), transposed, groups = args[:3], args[7], args[9]
            products = sum(args[10][:2])
        kernel = weight.shape[2:]
        # The weight is [out, in / groups, ...], transposed [in, out / groups, ...]. Each number of
        # the result, if transposed of the input, meets one row of it.
        met = inputs if transposed else result
        flops: int = products * 2 * met.numel() * math.prod(weight.shape[1:])
        suffix = " backward" if operator.name == "convolution_backward" else ""
        name = f"{'x'.join(map(str, kernel))} groups={groups}{suffix}"
        costs.convolutions[name] += 1
        if min(kernel) > LARGEST_KERNEL[len(kernel)]:
            costs.map_kernels += 1
            self._note(costs, "map kernel", operator)
        return flops

    def _note(self, costs: Costs, kind: str, operator: _Operator) -> None:
        if self._locates:
            costs.where[f"{kind}: {operator.name} at {_place()}"] += 1


class _Operator:
    """What the schema of an operator says."""

    def __init__(self, func: Any) -> None:
        namespace, self.name = func._schema.name.split("::")
        overload: str = func._schema.overload_name
        self.full_name = f"{self.name}.{overload}" if overload else self.name
        self.is_view: bool = func.is_view
        # "prim" asks for the device of a tensor and the like.
        self.has_kernel = not (self.is_view or namespace == "prim" or self.name in NO_KERNEL)
        arguments = func._schema.arguments
        self._written = [
            i for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write
        ]
        self.returns_fresh = not any(r.alias_info for r in func._schema.returns)

    def written(self, args: Any) -> list[Tensor]:
        """Return the arguments that the operator changes."""
        return [t for i in self._written if i < len(args) for t in _tensors((args[i],))]


# What scaled_dot_product_attention uses on the CPU, which stands for a GPU's.
_ATTENTIONS: dict[str, tuple[Callable[..., int], int]] = {
    "_scaled_dot_product_flash_attention_for_cpu": (sdpa_flop_count, 3),
    "_scaled_dot_product_flash_attention_for_cpu_backward": (sdpa_backward_flop_count, 4),
}
_MATMULS = frozenset({"addbmm", "addmm", "baddbmm", "bmm", "mm"})


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _bytes(tensor: Tensor) -> int:
    """Return the bytes that a kernel touches; elements with stride 0 are one."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return math.prod(n for n, stride in sizes if stride) * tensor.element_size()


# Attributes of every module.
_OF_MODULES = frozenset(vars(nn.Module()))

_PACKAGE = f"{Path(__file__).resolve().parents[1]}/"


def _place() -> str:
    """Return FILE:LINE of gatdist that runs now, or ran in the forward of this backward."""
    node = torch._C._current_autograd_node()
    if node is not None:
        metadata: Any = node.metadata
        lines = "".join(metadata.get("traceback_", [])).splitlines()
        for line in reversed(lines):
            if _PACKAGE in line:
                path, number = line.split('"')[1], line.split("line ")[1].split(",")[0]
                return f"{path.removeprefix(_PACKAGE)}:{number} (backward)"
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename.startswith(_PACKAGE) and frame.f_code.co_filename != __file__:
            return f"{frame.f_code.co_filename.removeprefix(_PACKAGE)}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"


def step_costs(
    config: Config,
    sample_shape: tuple[int, ...],
    num_classes: int,
    metadata: Mapping[str, Any],
    steps: Mapping[str, int],
    *,
    device: torch.device = CPU,
    locates: bool = False,
) -> dict[str, Costs]:
    """Return the costs of steps of a run on one GPU, by the names of ``steps``.

    Args:
        config: Its global batch is the batch of the GPU.
        sample_shape: Of one sample in network representation.
        num_classes: Of the data; 0 if unlabelled.
        metadata: Of the samples, passed to the networks.
        steps: Indices of steps, by name; they decide which lazy penalties are due.
        device: Of the fake tensors. The CPU stands for a GPU, with the operators of GPUs.
        locates: Whether to find the lines that cause what should not be there.
    """
    with fake_tensors(device), _without_gc(), CostMode(device, locates=locates) as mode:
        data = sample_shape, num_classes, metadata
        task, networks, traits = fake_networks(config, *data, device=device)
        comm = LocalCommunicator(device)
        state = TrainState(config, comm, *data, networks=networks, traits=traits, task=task)
        rule = state.rule(config)
        statistics, timer = Statistics(device), PhaseTimer(CPU)
        real = _samples(config, sample_shape, device)
        inputs = {
            name: _samples(config, shape, device)
            for name, shape in metadata.get("fields", {}).items()
        }
        state.samples_seen = SAMPLES_SEEN

        def step(number: int) -> Costs:
            # Of its own, so that no latents are left from the step before.
            positions = torch.empty(config.step_samples, dtype=torch.int64, device=device)
            labels = torch.empty_like(positions) if config.model.conditional else None
            found = mode.start()
            batch = Batch(real, labels, positions, number, len(real), inputs=inputs)
            train_step(state, rule, batch, config, statistics, timer)
            return found

        step(1)  # what is created once, such as constants
        return {name: step(number) for name, number in steps.items()}


def _samples(config: Config, shape: tuple[int, ...], device: torch.device) -> Tensor:
    samples = torch.empty(config.step_samples, *shape, device=device)
    samples = samples.to(DTYPES[config.precision.dtype])
    return samples.contiguous(memory_format=layout(config, samples))


_FAKE = FakeTensorMode(allow_non_fake_inputs=True)


@contextmanager
def _without_gc() -> Iterator[None]:
    """Free what is in a cycle after the block: the peak must not depend on when it is found."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def fake_tensors(device: torch.device) -> Iterator[None]:
    """Create tensors in the block as fake ones, with operators as on GPUs."""
    with ExitStack() as stack:
        # The fake device has no threads of its own.
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.enter_context(derivatives_of_gpus())
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        stack.enter_context(_FAKE)
        yield


def fake_networks(
    config: Config,
    sample_shape: tuple[int, ...],
    num_classes: int,
    metadata: Mapping[str, Any],
    *,
    device: torch.device,
) -> tuple[Task, tuple[nn.Module, nn.Module], dict[PlayerName, Traits]]:
    """Build the task, and networks of fake tensors; ``Module.to`` can't move others to them.

    Users' networks are examined before, on the CPU, since that needs values.
    """
    built_in = all(is_built_in(config, player) for player in BOTH)
    data = sample_shape, num_classes, metadata
    with _disable_current_modes():
        task = build_task(config, sample_shape, metadata)
        with torch.device("meta") if built_in else nullcontext():
            networks = build_networks_of(config, task, *data)
        traits = examine(config, dict(zip(BOTH, networks, strict=True)), task, *data)
    for network in networks:
        replace_tensors(network, device)
    return task, networks, traits


def replace_tensors(network: nn.Module, device: torch.device) -> None:
    """Replace parameters and buffers by fake ones on ``device``, and other tensors on the CPU."""
    fakes: dict[int, Tensor] = {}

    def fake(value: Any, place: torch.device) -> Any:
        if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
            return type(value)(fake(each, place) for each in value)
        if type(value) is dict:
            return {key: fake(each, place) for key, each in value.items()}
        if not isinstance(value, Tensor):
            return value
        if id(value) not in fakes:
            made = torch.empty_strided(
                value.shape, value.stride(), dtype=value.dtype, device=place
            ).requires_grad_(value.requires_grad)
            is_parameter = isinstance(value, nn.Parameter)
            fakes[id(value)] = nn.Parameter(made, value.requires_grad) if is_parameter else made
        return fakes[id(value)]

    for module in network.modules():
        for tensors in (module._parameters, module._buffers):
            tensors.update(fake(tensors, device))
        for name, value in vars(module).items():
            if name not in _OF_MODULES:
                vars(module)[name] = fake(value, CPU)
