"""Check a configuration, and estimate a run's memory, without training."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gatdist.common.seeding import generators_kept
from gatdist.config import BOTH, Config, PlayerName, flatten, import_plugins, redact_url
from gatdist.data.dataset import Dataset, open_dataset
from gatdist.data.order import WorkerShare
from gatdist.data.unpaired import orders_of, parts_of
from gatdist.evaluation import Evaluator
from gatdist.evaluation.metrics import higher_is_better
from gatdist.evaluation.validation import open_validation
from gatdist.game import (
    Game,
    Hyperparameters,
    Step,
    UpdateRule,
    build_update_rule,
    require_whole_batches,
    require_whole_groups,
)
from gatdist.game.build import Shapes, build_networks_of, build_task
from gatdist.game.contract import examine
from gatdist.game.exactness import require_exact
from gatdist.game.probe import check_step, probe_batch
from gatdist.game.updates import second_derivatives
from gatdist.monitor.numbers import plural
from gatdist.nn import slow_layer
from gatdist.parallel.communicator import LocalCommunicator
from gatdist.runs import Checkpoints, RunDirectory, require_saved_state
from gatdist.storage import Store
from gatdist.training.state import start_from_another_run

# Weights, gradients and Adam's two moments.
_COPIES_A_PLAYER = 4
# Copies of weights and moments that health.atomic keeps.
_COPIES_TO_UNDO = 3


@dataclass(frozen=True)
class Checked:
    """What :func:`check` has built and found.

    Attributes:
        dataset: of the run.
        generator: untrained, as is the discriminator.
        discriminator: likewise.
        rule: of the updates.
        sizes: numbers of workers in ``cluster.workers`` that can train the run, ascending.
        warnings: about user code.
    """

    dataset: Dataset
    generator: nn.Module
    discriminator: nn.Module
    rule: UpdateRule
    sizes: Sequence[int]
    warnings: tuple[str, ...] = ()


@generators_kept()
def check(config: Config, run_dir: str, device: torch.device | None = None) -> Checked:
    """Raise every UserError that training would raise at its start, before any worker starts.

    Nothing is written to ``run_dir``. Networks are tried out on ``device`` (default: the CPU).
    """
    fitting: Sequence[int] = config.fitting_workers()
    import_plugins(config.plugins)
    store = Store(run_dir, config.run.storage_options)
    higher_is_better(config.run)
    dataset = open_dataset(config.data)
    for name, order in orders_of(config, dataset).items():
        part = parts_of(dataset)[name]
        # The fewest workers have the largest shares; of some more, each may read more streams.
        for size in fitting[: bisect_right(fitting, 2 * fitting[0])]:
            for rank in {0, size - 1}:
                share = WorkerShare.from_config(config, rank, size)
                part.memory_budget(order, part.config, share)
    sample_shape, num_classes = dataset.sample_format.shape, dataset.num_classes
    metadata = dataset.sample_format.metadata
    task = build_task(config, sample_shape, metadata)
    networks = build_networks_of(config, task, sample_shape, num_classes, metadata)
    on_gpus = config.cluster.gpus_per_worker or torch.cuda.is_available()
    device = device or torch.device("cpu")
    by_player = {name: network.to(device) for name, network in zip(BOTH, networks, strict=True)}
    warnings: list[str] = []
    if not Checkpoints(store.child("checkpoints")).has_any():
        warnings += start_from_another_run(config, by_player, run_dir)
    shapes = Shapes.of(task, sample_shape, metadata)
    traits = examine(config, by_player, task, sample_shape, num_classes, metadata)
    warnings += require_exact(config, traits)
    for name, network in by_player.items():
        fitting = require_whole_groups(config, name, network, fitting)
        if not on_gpus:
            require_whole_batches(config, name, network, fitting[-1])
    generator, discriminator = networks
    game = Game.from_config(config, *networks, shapes.shown, traits, task, metadata)
    rule = build_update_rule(config, game)
    RunDirectory(store).require_same(config)  # after unknown names, whose messages say more
    warnings += check_step(config, rule, sample_shape, num_classes, metadata.get("fields", {}))
    if on_gpus:
        warnings += _slow_derivatives(config, rule, by_player)
    comm = LocalCommunicator(device)
    Evaluator(
        config.evaluate,
        open_validation(config, dataset),
        comm,
        device,
        conditional=config.model.conditional,
        training=dataset,
        has_pairs=task.has_inputs,
    )
    return Checked(dataset, generator, discriminator, rule, fitting, tuple(warnings))


def _slow_derivatives(
    config: Config, rule: UpdateRule, networks: Mapping[PlayerName, nn.Module]
) -> list[str]:
    """Warn of convolutions whose second derivatives are slow on GPUs."""
    found = []
    for player, network in networks.items():
        reasons = second_derivatives(config, type(rule), rule.game, player)
        layer = slow_layer(network)
        if reasons and layer is not None:
            found.append(
                f"model.{player}.name = {getattr(config.model, player).name!r}: the second "
                f"derivatives of {layer!r}, which {reasons[0]} needs, are slow on GPUs. Use the "
                "convolutions of gatdist.nn"
            )
    return found


def plan(config: Config, run_dir: str) -> dict[str, Any]:
    """Check a run, and estimate what it needs.

    Returns:
        JSON values: ``config``, ``run_dir``, ``parameters`` by player, ``state_bytes`` and
        ``activation_bytes`` (saved for backward) per worker, ``checkpoint_bytes``, ``num_shards``,
        ``num_samples``, ``samples_seen`` (where the run resumes), ``steps_to_go``, ``warnings``.
    """
    checked = check(config, run_dir)
    networks = {"generator": checked.generator, "discriminator": checked.discriminator}
    bytes_of = {name: _num_bytes(network) for name, network in networks.items()}
    state_bytes = _COPIES_A_PLAYER * sum(bytes_of.values()) + bytes_of["generator"]
    checkpoint_bytes = state_bytes - sum(bytes_of.values())
    if config.health.atomic:
        state_bytes += _COPIES_TO_UNDO * sum(bytes_of.values())
    store = Store(run_dir, config.run.storage_options)
    newest = Checkpoints(store.child("checkpoints")).newest()
    samples_seen = 0
    if newest is None:
        RunDirectory(store).require_fresh()
    else:
        subject = f"{store.url}: {newest.name}/state.json"
        require_saved_state(newest.state, subject, newest.named_samples)
        samples_seen = newest.state["samples_seen"]
    return {
        "config": config.redacted(),
        "run_dir": redact_url(run_dir),
        "parameters": {name: _num_parameters(network) for name, network in networks.items()},
        "state_bytes": state_bytes,
        "activation_bytes": _activation_bytes(config, checked),
        "checkpoint_bytes": checkpoint_bytes,
        "num_shards": checked.dataset.num_shards,
        "num_samples": checked.dataset.num_samples,
        "samples_seen": samples_seen,
        "warnings": list(checked.warnings),
        "steps_to_go": -(-max(0, config.run.total_samples - samples_seen) // config.step_samples),
    }


def describe(found: dict[str, Any]) -> str:
    """Format a plan."""
    parameters = ", ".join(f"{name} {count:,}" for name, count in found["parameters"].items())
    lines = [f"{key} = {value!r}" for key, value in flatten(found["config"]).items()]
    lines += [
        "",
        f"data         {found['num_samples']:,} samples in {plural(found['num_shards'], 'shard')}",
        f"parameters   {parameters}",
        f"memory       {_size(found['state_bytes'])} of state and about "
        f"{_size(found['activation_bytes'])} of activations in each worker",
        f"checkpoint   {_size(found['checkpoint_bytes'])}",
        f"to go        {found['steps_to_go']:,} steps, from sample {found['samples_seen']:,}",
        f"run dir      {found['run_dir']}",
        *(f"warning      {message}" for message in found["warnings"]),
    ]
    return "\n".join(lines)


def _num_bytes(network: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in network.state_dict().values())


def _num_parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def _activation_bytes(config: Config, checked: Checked) -> int:
    """Return bytes that a step's largest phase saves for backward, scaled from two samples."""
    dataset = checked.dataset
    batch = checked.rule.game.prepare(
        probe_batch(
            config,
            dataset.sample_format.shape,
            dataset.num_classes,
            fields=dataset.sample_format.shapes_of_fields,
        )
    )
    optim = {p: Hyperparameters(getattr(config.optim, p).learning_rate.at(0)) for p in BOTH}
    step = Step(batch, optim)
    networks = (checked.generator, checked.discriminator)
    parameters = {p.data_ptr() for network in networks for p in network.parameters()}
    largest = 0
    at_once = -(-config.run.global_batch // checked.sizes[0])  # on the fewest workers
    if config.run.reduction == "canonical":
        at_once = config.run.global_batch // config.run.virtual_workers
    for phase in checked.rule.all_phases(step):
        saved: dict[int, int] = {}

        def keep(tensor: Tensor, saved: dict[int, int] = saved) -> Tensor:
            if tensor.data_ptr() not in parameters:
                saved[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            phase.backward(phase.batch)
        sizes = [getattr(config.optim, name).micro_batch or at_once for name in phase.players]
        largest = max(largest, sum(saved.values()) * min(at_once, *sizes) // len(phase.batch))
    return largest


def _size(count: int) -> str:
    value = float(count)
    units = ["bytes", "KB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{value:.3g} {units[0]}"
