"""What a run would do and need, found out without training a step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gatdist.config import Config, import_plugins
from gatdist.data import open_dataset
from gatdist.game import Batch, Game, update_rules
from gatdist.models import DTYPES, build_networks
from gatdist.runs import Checkpoints, read_config
from gatdist.storage import Store

# Adam keeps two moments a weight; each weight also has a gradient.
_COPIES_A_PLAYER = 4


def plan(config: Config, run_dir: str) -> dict[str, Any]:
    """Check everything that can be checked before training, and estimate what it needs.

    Args:
        config: of the run.
        run_dir: its folder; nothing is written there.

    Returns:
        JSON values: ``config``, ``parameters`` by player, ``state_bytes``, ``activation_bytes`` a
        worker (what one step of its share of the batch saves for backward), ``checkpoint_bytes``,
        ``num_shards``, ``num_samples``, ``samples_seen`` (where the run would go on),
        ``steps_to_go``.

    Raises:
        UserError: what training would raise.
    """
    config.check_workers(config.cluster.workers)
    import_plugins(config.plugins)
    dataset = open_dataset(config.data)
    generator, discriminator = build_networks(config, dataset.sample_shape, dataset.num_classes)
    bytes_of = {"generator": _num_bytes(generator), "discriminator": _num_bytes(discriminator)}
    state_bytes = _COPIES_A_PLAYER * sum(bytes_of.values()) + bytes_of["generator"]
    gradients = sum(bytes_of.values())
    samples_seen = _samples_seen(config, run_dir)
    return {
        "config": config.public(),
        "run_dir": run_dir,
        "parameters": {
            name: _num_parameters(n)
            for name, n in (("generator", generator), ("discriminator", discriminator))
        },
        "state_bytes": state_bytes,
        "activation_bytes": _activation_bytes(
            config, generator, discriminator, dataset.sample_shape, dataset.num_classes
        ),
        "checkpoint_bytes": state_bytes - gradients,
        "num_shards": dataset.num_shards,
        "num_samples": dataset.num_samples,
        "samples_seen": samples_seen,
        "steps_to_go": -(
            -max(0, config.run.total_samples - samples_seen) // config.run.global_batch
        ),
    }


def describe(found: dict[str, Any]) -> str:
    """A plan for people."""
    from gatdist.config import flatten

    parameters = ", ".join(f"{name} {count:,}" for name, count in found["parameters"].items())
    lines = [f"{key} = {value!r}" for key, value in flatten(found["config"]).items()]
    lines += [
        "",
        f"data         {found['num_samples']:,} samples in {found['num_shards']} shards",
        f"parameters   {parameters}",
        f"memory       {_size(found['state_bytes'])} of state and about "
        f"{_size(found['activation_bytes'])} of activations in each worker",
        f"checkpoint   {_size(found['checkpoint_bytes'])}",
        f"to go        {found['steps_to_go']:,} steps, from sample {found['samples_seen']:,}",
        f"run folder   {found['run_dir']}",
    ]
    return "\n".join(lines)


def _samples_seen(config: Config, run_dir: str) -> int:
    store = Store(run_dir, config.run.storage_options)
    old = read_config(store)
    if old is None:
        return 0
    from gatdist.config import require_unchanged

    require_unchanged(old, config, run_dir)
    newest = Checkpoints(store.child("checkpoints")).newest()
    return newest.state["samples_seen"] if newest else 0


def _num_bytes(network: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in network.state_dict().values())


def _num_parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def _activation_bytes(
    config: Config,
    generator: nn.Module,
    discriminator: nn.Module,
    sample_shape: tuple[int, ...],
    num_classes: int,
) -> int:
    """Bytes that the largest phase of a step saves for backward.

    Measured with two samples, then scaled.
    """
    n = 2
    batch = Batch(
        real=torch.zeros(n, *sample_shape, dtype=DTYPES[config.precision.dtype]),
        labels=torch.zeros(n, dtype=torch.int64) if num_classes else None,
        positions=torch.arange(n),
        step=0,  # every lazy penalty is due at step 0
    )
    parameters = {
        p.data_ptr() for network in (generator, discriminator) for p in network.parameters()
    }
    largest = 0
    for phase in update_rules[config.game.update_rule](
        Game.from_config(config, generator, discriminator), config.game
    ).phases(batch):
        saved: dict[int, int] = {}

        def keep(tensor: Tensor, saved: dict[int, int] = saved) -> Tensor:
            if tensor.data_ptr() not in parameters:
                saved[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            phase.backward()
        largest = max(largest, sum(saved.values()))
    return largest * config.run.global_batch // config.cluster.workers // n


def _size(count: int) -> str:
    value = float(count)
    units = ["bytes", "KB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{value:.3g} {units[0]}"
