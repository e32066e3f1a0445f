"""The data that a run is evaluated with."""

from __future__ import annotations

from gatdist.common.errors import ConfigError, DataError
from gatdist.config import Config, redact_url
from gatdist.data.dataset import Dataset, open_dataset
from gatdist.data.modalities import MODALITIES, ReadSpec
from gatdist.evaluation.statistics import StatisticsOnly
from gatdist.parallel.communicator import Communicator
from gatdist.storage.urls import options_for


def open_validation(config: Config, training: Dataset, comm: Communicator | None = None) -> Dataset:
    """Return the data of ``evaluate.url``, or the held-out samples, or else the training data.

    Args:
        config: Of the run.
        training: The data of the run.
        comm: The workers, if all call this.

    Raises:
        DataError: Samples in ``evaluate.url`` have another format.
        StorageError: It can't be read.
    """
    url = config.evaluate.url
    if not url:
        return training.held_out() or training
    options = options_for(url, config.data.url, config.data.storage_options)
    where = {
        "url": url,
        "storage_options": options | config.evaluate.storage_options,
        "shards_url": "",
        "shards_storage_options": {},
    }
    found = open_dataset(config.data.model_copy(update=where), comm)
    theirs, ours = described_format(found.spec), described_format(training.spec)
    if theirs != ours:
        rule = f"holds {theirs}, and the training data {ours}"
        raise DataError("evaluate.url", rule, value=redact_url(url))
    return found


def require_two_samples(dataset: Dataset, training: Dataset | StatisticsOnly | None) -> None:
    """Raise an error about the key that chooses the data, unless metrics can be computed of it.

    Args:
        dataset: What :func:`open_validation` returned, or other data if ``training`` is None.
        training: The data of the run.
    """
    if dataset.num_samples >= 2:
        return
    if training is None or training is dataset:
        key = "data.url"
    elif dataset.part is None:
        key = "evaluate.url"
    else:
        rule = f"holds out 1 of the {training.num_samples + 1:,} samples; metrics need 2"
        hint = "Hold out more, or set evaluate.metrics = []"
        raise ConfigError("data.held_out", rule, value=dataset.part.share, hint=hint)
    rule, hint = "holds fewer than 2 samples; metrics need 2", "Set evaluate.metrics = []"
    raise DataError(key, rule, hint=hint)


def described_format(spec: ReadSpec) -> str:
    """Describe what must agree of samples to be compared."""
    found = f"{MODALITIES[spec.modality].noun}s of {' × '.join(map(str, spec.shape))}"
    details = {
        "hertz": spec.sample_rate,
        "different tokens": spec.num_tokens,
        "characters": spec.vocabulary and len(spec.vocabulary),
    }
    found += "".join(f", {n:,} {what}" for what, n in details.items() if n is not None)
    others = list(spec.of_fields().items())[1:]
    return found + "".join(f", {name!r}: {described_format(field)}" for name, field in others)
