"""Evaluation of a run, or of samples generated elsewhere, against its data or another reference."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, cast

import torch
from pydantic import Field, ValidationError

from gatdist import packing
from gatdist.common.cores import usable_cores
from gatdist.common.errors import CheckpointError, ConfigError, DataError
from gatdist.common.heartbeat import beat
from gatdist.config import (
    Config,
    DataConfig,
    EvaluateConfig,
    Section,
    first_error,
    import_plugins,
    redact_url,
    set_value,
)
from gatdist.data import builtin
from gatdist.data.dataset import Dataset, open_dataset
from gatdist.data.format.manifest import MANIFEST
from gatdist.data.modalities import MODALITIES, ReadSpec
from gatdist.data.sample_format import SampleFormat
from gatdist.evaluation import Evaluation, Evaluator
from gatdist.evaluation import metrics as known_metrics
from gatdist.evaluation.evaluator import DatasetSamples
from gatdist.evaluation.statistics import ENDING, StatisticsOnly, read_statistics
from gatdist.evaluation.validation import described_format, open_validation
from gatdist.packing.processes import do_all
from gatdist.parallel.communicator import LocalCommunicator
from gatdist.runs.directory import CONFIG, READING, adopted
from gatdist.runs.mapped import Mapped
from gatdist.runs.sampling import require_num
from gatdist.runs.trained import Sampler, load_run
from gatdist.storage import Store
from gatdist.storage.store import at_file
from gatdist.storage.urls import options_for

Reference = Dataset | StatisticsOnly


class _Settings(Section):
    """Settings of an evaluation without a run."""

    data: DataConfig
    evaluate: EvaluateConfig = EvaluateConfig()
    plugins: list[str] = Field(default_factory=list)


class Requested(NamedTuple):
    """What to measure; None: what the configuration says."""

    metrics: Sequence[str] | None = None
    num: int | None = None
    overrides: Sequence[str] = ()

    def __call__(self, config: EvaluateConfig, *, statistics: bool) -> EvaluateConfig:
        """Return the section with these values.

        By default, only metrics are computed for which ``statistics`` of the real data suffice, if
        there is nothing else.
        """
        chosen = list(config.metrics if self.metrics is None else self.metrics)
        if statistics and self.metrics is None:
            chosen = [name for name in chosen if "real_samples" not in known_metrics[name].needs]
        if not chosen:
            rule, hint = "names nothing to measure", "Name a metric: --metric fid"
            raise ConfigError("evaluate.metrics", rule, value=[], hint=hint)
        num = config.num_samples if self.num is None else self.num
        return config.model_copy(update={"metrics": chosen, "num_samples": num})


def evaluate(
    url: str, requested: Requested, against: str | None, device: torch.device
) -> dict[str, Any]:
    """Measure a run, or samples in a folder, archive or data set; see :func:`gatdist.evaluate`."""
    if requested.num is not None:
        require_num(requested.num)
    if against is not None and not _is_run(url):
        return _evaluate_samples(url, requested, against, device)
    return _evaluate_run(Store(url), requested, against, device)


def save_statistics(
    url: str, out: str, overrides: Sequence[str], device: torch.device
) -> dict[str, Any]:
    """Write mean and covariance of the features of data; see :func:`gatdist.statistics`."""
    settings = _settings(url, overrides)
    config = settings.evaluate.model_copy(update={"metrics": ["fid"]})
    with _opened(settings.data) as data:
        evaluator = Evaluator(config, data, LocalCommunicator(device), device)
        statistics = evaluator.statistics()
    store, name = at_file(out)
    store.publish(name, statistics.encode())
    return {
        "file": out,
        "num_samples": data.num_samples,
        "num_features": len(statistics.fit.mean),
        "protocol": dict(statistics.protocol),
    }


def _evaluate_run(
    run: Store, requested: Requested, against: str | None, device: torch.device
) -> dict[str, Any]:
    if not run.exists(CONFIG):
        rule = "is not a run directory (it has no config.json)"
        hint = "Check the path, or name what to compare samples with: --against DATA"
        raise CheckpointError(run.url, rule, hint=hint)
    trained = load_run(run, device)
    if against is None and not trained.config.data.url:
        hint = "Name what to compare with: --against DATA"
        raise CheckpointError(run.url, "holds imported weights, and names no data", hint=hint)
    config = adopted(trained.config, requested.overrides, run, against)
    state, sample_format = trained.checkpoint.state, trained.sample_format
    chosen = requested(config.evaluate, statistics=_is_statistics(against))
    has_inputs = trained.task.has_inputs
    inputs = None
    if has_inputs and _is_statistics(against):
        inputs = _validation(adopted(trained.config, requested.overrides, run))
        chosen = _with_number_of(inputs, chosen)
    with _reference(config.data, against, sample_format) as reference:
        training = None
        if against is None and isinstance(reference, Dataset):
            training = reference
            _require_same_data(run, training, state["order"]["fingerprint"])
            reference = open_validation(config, training)
        has_classes = against is None or _has_same_classes(reference, sample_format.spec)
        is_conditional = trained.config.model.conditional and has_classes
        comm = LocalCommunicator(device)
        evaluator = Evaluator(
            chosen,
            reference,
            comm,
            device,
            training=training,
            conditional=is_conditional,
            at_once=trained.at_once,
            has_pairs=has_inputs,
        )
        generate: Sampler | Mapped
        if has_inputs:
            generate = trained.mapped(inputs or cast("Dataset", reference), "evaluation")
        else:
            generate = trained.sampler(trained.config.run.seed, "evaluation")
        found = evaluator(generate, trained.discriminator)
    return _outcome(found, against) | {"samples_seen": state["samples_seen"]}


def _validation(config: Config) -> Dataset:
    return open_validation(config, open_dataset(config.data))


def _with_number_of(inputs: Dataset, chosen: EvaluateConfig) -> EvaluateConfig:
    """Return the section with a number of samples that have inputs."""
    count = chosen.num_samples or inputs.num_samples
    if count > inputs.num_samples:
        rule = f"must be at most {inputs.num_samples:,}, the samples with inputs"
        raise ConfigError("evaluate.num_samples", rule, value=count)
    return chosen.model_copy(update={"num_samples": count})


def _evaluate_samples(
    url: str, requested: Requested, against: str, device: torch.device
) -> dict[str, Any]:
    settings = _settings(against, requested.overrides)
    chosen = requested(settings.evaluate, statistics=_is_statistics(against))
    for name in chosen.metrics:
        if "discriminator" in known_metrics[name].needs:
            rule = f"{name!r} needs a discriminator, and {redact_url(url)} is no run"
            raise ConfigError("evaluate.metrics", rule, hint="Remove it")
    own = settings.data.model_copy(
        update={
            "url": url,
            "storage_options": options_for(url, against, settings.data.storage_options),
            "shards_url": "",
            "shards_storage_options": {},
        }
    )
    with ExitStack() as stack:
        reference: Reference
        if _is_statistics(against):
            statistics = read_statistics(against)
            generated = stack.enter_context(_opened(own))
            reference = StatisticsOnly(statistics, generated.sample_format)
        else:
            reference = stack.enter_context(_opened(settings.data))
            generated = stack.enter_context(_opened(own, reference.spec))
            _require_same_format(reference, generated.sample_format, against)
        count = chosen.num_samples or generated.num_samples
        if count > generated.num_samples:
            rule = f"must be at most the {generated.num_samples:,} samples in {redact_url(url)}"
            raise ConfigError("evaluate.num_samples", rule, value=count)
        evaluator = Evaluator(
            chosen.model_copy(update={"num_samples": count}),
            reference,
            LocalCommunicator(device),
            device,
            conditional=_has_same_classes(reference, generated.spec),
        )
        return _outcome(evaluator(DatasetSamples(generated, generated.num_samples)), against)


def _outcome(found: Evaluation, against: str | None) -> dict[str, Any]:
    outcome = {
        "metrics": found.metrics,
        "num_samples": found.protocol["num_generated"],
        "protocol": found.protocol,
    }
    return outcome if against is None else outcome | {"against": redact_url(against)}


def _is_run(url: str) -> bool:
    return not url.startswith(builtin.PREFIX) and Store(url).exists(CONFIG)


def _is_statistics(against: str | None) -> bool:
    return against is not None and against.endswith(ENDING)


def _settings(url: str, overrides: Sequence[str]) -> _Settings:
    values: dict[str, Any] = {"data": {}}
    for override in overrides:
        set_value(values, override)
    if isinstance(values["data"], dict):  # else an error below
        values["data"]["url"] = url
    try:
        settings = _Settings.model_validate(values)
    except ValidationError as error:
        raise first_error(error, values, _Settings) from None
    import_plugins(settings.plugins)
    return settings


@contextmanager
def _reference(
    config: DataConfig, against: str | None, generated: SampleFormat
) -> Iterator[Reference]:
    """Open what a run's samples are compared with."""
    if against is None:
        yield open_dataset(config)
    elif _is_statistics(against):
        yield StatisticsOnly(read_statistics(against), generated)
    else:
        with _opened(config, generated.spec) as data:
            _require_same_format(data, generated, against)
            yield data


@contextmanager
def _opened(config: DataConfig, like: ReadSpec | None = None) -> Iterator[Dataset]:
    """Open a data set; or a folder or archive of files, packed into a temporary folder.

    Files are packed ``like`` the samples that they are compared with.
    """
    url = config.url
    is_packed = url.startswith(builtin.PREFIX)
    if is_packed or Store(url, config.storage_options).exists(MANIFEST):
        yield open_dataset(config)
        return
    with tempfile.TemporaryDirectory(prefix="gatdist-evaluate-") as folder:
        dest = os.path.join(folder, "data")
        _pack(config, dest, like)
        here: dict[str, Any] = {
            "url": dest,
            "storage_options": {},
            "shards_url": "",
            "cache_dir": None,
        }
        yield open_dataset(config.model_copy(update=here))


def _pack(config: DataConfig, dest: str, like: ReadSpec | None) -> None:
    given: dict[str, Any] = {}
    if like and like.modality == "image":
        given = {"bits": like.bits}
    elif like and like.modality == "text":
        given = {"length": like.shape[-1]}
    request = packing.Request(
        source=config.url,
        dest=dest,
        recipe=packing.read_recipe(given),
        source_options=config.storage_options,
        strict=True,
    )
    try:
        plan = packing.prepare(request)
        workers = usable_cores()
        records = do_all(packing.Worker, plan.job, plan.tasks, workers, lambda done, found: beat())
        packing.finish(plan, records)
    except DataError as error:
        if not error.subject.startswith("--"):
            raise
        # An option of `gatdist pack`.
        problem = str(error).partition(": ")[2].partition(". ")[0]
        hint = f"Pack it first: gatdist pack SOURCE DEST {error.subject} VALUE"
        raise DataError(redact_url(config.url), problem, hint=hint) from None


def _require_same_data(run: Store, data: Dataset, fingerprint: str) -> None:
    if fingerprint and data.fingerprint != fingerprint:  # "" of imported weights
        raise CheckpointError(
            f"{run.url}: fingerprint",
            f"the run was trained on other data ({fingerprint[:16]}…)",
            value=data.fingerprint[:16] + "…",
            hint="Restore the data at data.url, or compare with other data: --against DATA",
        )


def _require_same_format(reference: Dataset, generated: SampleFormat, url: str) -> None:
    theirs, ours = (described_format(spec) for spec in (reference.spec, generated.spec))
    if theirs != ours:
        rule = f"holds {theirs}, and the generated samples are {ours}"
        known = MODALITIES[generated.modality].keys
        keys = [f"data.{key}" for key in READING if key in known]
        is_same = reference.modality == generated.modality
        hint = f"Set {' and '.join(keys)} to read them alike" if keys and is_same else ""
        raise DataError(redact_url(url), rule, hint=hint)


def _has_same_classes(reference: Reference, generated: ReadSpec) -> bool:
    """Return whether generated samples are labelled with the classes of the real ones."""
    if not isinstance(reference, Dataset) or not reference.num_classes:
        return False
    count, names = reference.num_classes, generated.class_names
    expected = reference.spec.class_names
    if generated.num_classes != count or names is None or names == expected:
        return generated.num_classes == count
    return expected is None and all(
        name.isdecimal() and int(name) == i for i, name in enumerate(names)
    )
