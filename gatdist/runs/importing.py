"""Runs from published weights: to sample, evaluate and export them, and to train from them."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gatdist.common.errors import CheckpointError, ConfigError
from gatdist.common.tensor_files import read_safetensors
from gatdist.config import BOTH, Config, PlayerName, parse_config, redact_url, set_value
from gatdist.data.modalities import ReadSpec
from gatdist.models import build_networks
from gatdist.models.published import Published, converted, families
from gatdist.runs.checkpoint import GROUPS
from gatdist.runs.checkpoints import Checkpoints
from gatdist.runs.directory import RunDirectory
from gatdist.storage import Store
from gatdist.storage.store import at_file

# Prefixes of names in a file of several networks, the best first; and of wrapped networks.
_PREFIXES: Mapping[PlayerName, Sequence[str]] = {
    "generator": ("G_ema.", "G."),
    "discriminator": ("D.",),
}
_WRAPPERS = ("state_dict.", "module.", "Model.")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_MAX_DEPTH, _MAX_TABLES = 16, 10_000  # of dictionaries in a pickle


def import_weights(
    family: str,
    run_dir: str,
    files: Mapping[PlayerName, str],
    *,
    allow_pickle: bool = False,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """See :func:`gatdist.import_weights`."""
    tensors = {player: _read(url, player, allow_pickle) for player, url in files.items()}
    subject = redact_url(files["generator"])
    try:
        published = families[family](tensors["generator"])
    except (KeyError, StopIteration, IndexError, ValueError) as error:
        rule = f"is no generator of {family!r} (lacks {error})"
        raise CheckpointError(subject, rule, hint="Name its family") from None
    config = _config(published, overrides)
    built = build_networks(config, published.sample_shape, published.num_classes)
    networks = dict(zip(BOTH, built, strict=True))
    for player, file in files.items():
        network, names = networks[player], getattr(published, player)
        try:
            values = converted(network.state_dict(), tensors[player], names, published.ignored)
        except (ValueError, KeyError) as error:
            rule = f"does not fit the {player} of {family!r}: {error}"
            hint = "Set its options with --set, such as model.discriminator.minibatch_deviation=8"
            raise CheckpointError(redact_url(file), rule, hint=hint) from None
        network.load_state_dict(values)
    _write(config, networks, _spec(published), run_dir)
    return {
        "run_dir": redact_url(run_dir),
        "family": family,
        "model": config.redacted()["model"],
        "sample_shape": list(published.sample_shape),
        "num_classes": published.num_classes,
        "imported": sorted(tensors),
    }


def _read(url: str, player: PlayerName, allow_pickle: bool) -> dict[str, Tensor]:
    """Read a state dict: safetensors, or a pickle without code, of one or both networks."""
    store, name = at_file(url)
    content, subject = store.read(name), redact_url(url)
    if allow_pickle:
        try:
            loaded = torch.load(  # noqa: TID251  (on request; without code)
                io.BytesIO(content), map_location="cpu", weights_only=True
            )
        except Exception as error:  # of a hostile file, any
            problem = str(error).partition(". ")[0] or type(error).__name__
            rule = f"can't be read with weights_only=True ({problem})"
            hint = "Save its state dicts alone: torch.save(network.state_dict(), FILE)"
            raise CheckpointError(subject, rule, hint=hint) from None
        tensors = _flat(loaded, subject)
    else:
        try:
            tensors = read_safetensors(content)
        except ValueError as error:
            hint = "Convert it with safetensors, or use --pickle to read it with weights_only=True"
            raise CheckpointError(subject, f"is no safetensors file ({error})", hint=hint) from None
    for prefix in _PREFIXES[player]:
        if any(key.startswith(prefix) for key in tensors):
            tensors = _within(tensors, prefix)
            break
    for prefix in _WRAPPERS:
        if tensors and all(key.startswith(prefix) for key in tensors):
            tensors = _within(tensors, prefix)
    for key, tensor in tensors.items():
        if fault := _fault(tensor):
            raise CheckpointError(f"{subject}: tensor {key}", fault)
    return tensors


def _fault(tensor: Tensor) -> str:
    """Return why a tensor holds no weights; "" if it does."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        return "is not a dense tensor"
    if tensor.dtype not in _DTYPES:
        return f"is {str(tensor.dtype).removeprefix('torch.')}; weights are float16 to float64"
    if tensor.nbytes > tensor.untyped_storage().nbytes():  # a view that repeats numbers
        return "is not a dense tensor"
    if not tensor.numel():
        return "is empty"
    return "" if tensor.isfinite().all() else "is not finite"


def _flat(loaded: Any, subject: str) -> dict[str, Tensor]:
    """Return the tensors in nested dictionaries under their joined names."""
    found: dict[str, Tensor] = {}
    tables: list[tuple[str, int, Any]] = [("", 0, loaded)]
    for prefix, depth, table in tables:
        for key, value in table.items() if isinstance(table, dict) else ():
            if isinstance(value, Tensor):
                found[f"{prefix}{key}"] = value
            elif isinstance(value, dict):
                tables.append((f"{prefix}{key}.", depth + 1, value))
        # A dictionary may hold itself.
        if depth > _MAX_DEPTH or len(tables) > _MAX_TABLES:
            hint = "Save its state dicts alone: torch.save(network.state_dict(), FILE)"
            raise CheckpointError(subject, "nests too many dictionaries", hint=hint)
    return found


def _within(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        key.removeprefix(prefix): tensor
        for key, tensor in tensors.items()
        if key.startswith(prefix)
    }


def _config(published: Published, overrides: Sequence[str]) -> Config:
    height, width = published.sample_shape[1:]
    values: dict[str, Any] = {
        "run": {"total_samples": 1, "global_batch": 1},
        "data": {"url": "", "resolution": [height, width]},
        "model": dict(published.model),
        "evaluate": {"metrics": []},
    }
    for override in overrides:
        set_value(values, override)
    config = parse_config(values)
    if config.data.resolution != [height, width]:
        rule, hint = "must be that of the weights", f"Leave it out, or use {[height, width]}"
        raise ConfigError("data.resolution", rule, value=config.data.resolution, hint=hint)
    return config


def _spec(published: Published) -> ReadSpec:
    return ReadSpec(
        modality="image",
        sample_shape=list(published.sample_shape),
        num_classes=published.num_classes,
    )


def _write(
    config: Config, networks: Mapping[PlayerName, nn.Module], spec: ReadSpec, run_dir: str
) -> None:
    """Write the run directory of a run that has not begun, with a checkpoint."""
    directory = RunDirectory(Store(run_dir))
    checkpoints = Checkpoints(directory.store.child("checkpoints"))
    if checkpoints.has_any():
        hint = "Choose another --run-dir"
        raise CheckpointError(redact_url(run_dir), "holds a run already", hint=hint)
    directory.claim(config)
    directory.start_attempt([], None, "imported")
    saved = {
        "version": 2,
        "status": "imported",
        "reason": "",
        "samples_seen": 0,
        "metrics": {},
        "attempt": directory.attempt,
        "evaluating": None,
        "config_digest": config.digest(),
        "samples": spec.model_dump(mode="json"),
        "order": {"fingerprint": ""},
        "wall_time_s": 0.0,
        "convergence": {"best": None, "best_samples": 0},
        "rollbacks": 0,
        "counted": {"nonfinite": 0, "spikes": 0, "rollbacks": 0},
    }
    tensors = {
        f"{part}/{name}": tensor
        for player, network in networks.items()
        for part in {player, GROUPS[player]}
        for name, tensor in network.state_dict().items()
    }
    checkpoints.save(0, tensors, saved, attempt=directory.attempt)
    checkpoints.wait()
