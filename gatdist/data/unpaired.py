"""Unpaired domains: further data sets, whose samples become fields of those of the first.

Each data set has an order of its own, which depends on the seed and its name. All use the same
position in the run, so the samples that meet do not depend on the number of workers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from gatdist.common.errors import ConfigError, DataError
from gatdist.config import Config, DataConfig, redact_url
from gatdist.data.dataset import Dataset, Samples, open_dataset
from gatdist.data.format.manifest import TARGET, FieldSpec
from gatdist.data.modalities import ReadSpec, join, new_samples
from gatdist.data.order import Indices, SampleOrder, hash_words
from gatdist.storage.urls import options_for

if TYPE_CHECKING:  # needs torch
    from gatdist.parallel.communicator import Communicator

# Keys of the configuration that a domain does not share with the first data set.
_OWN_KEYS: dict[str, Any] = {
    "dequantize": False,
    "x_flip": False,
    "vocabulary": None,
    "unpaired": {},
}
_KEY = re.compile(r"\bdata\.(resolution|channels|length|shards_\w+)")


class Domains(Dataset):
    """A data set whose samples get one field from each of several others.

    Read by number, sample i has sample i of each other, which begins anew after its last.

    Attributes:
        own: The first data set, without these fields.
        others: The others by field.
    """

    def __init__(self, own: Dataset, others: Mapping[str, Dataset]) -> None:
        super().__init__(own._indexes, own._whole_manifest, own.config, own.part)
        self.own, self.others = own, others
        self.spec = _joined_spec(own.spec, {name: each.spec for name, each in others.items()})
        self.notes = own.notes
        for each in others.values():  # what any of them notes
            each.notes = own.notes

    @property
    def datasets(self) -> Mapping[str, Dataset]:
        return {"": self.own, **self.others}

    @property
    def bad_samples(self) -> dict[int, str]:
        """Problem of each sample that was substituted; numbers count through all data sets."""
        found: dict[int, str] = {}
        begin = 0
        for dataset in self.datasets.values():
            found |= {begin + i: problem for i, problem in dataset.bad_samples.items()}
            begin += dataset.num_samples
        return found

    def held_out(self) -> Dataset | None:
        own = self.own.held_out()
        others = {name: each.held_out() for name, each in self.others.items()}
        found = {name: each for name, each in others.items() if each is not None}
        return own and Domains(own, found)

    def read(self, indices: Indices) -> tuple[Samples, Indices | None]:
        indices = np.asarray(indices, dtype=np.int64)
        own, labels = self.own.read(indices)
        others = [each.read(indices % each.num_samples)[0] for each in self.others.values()]
        return join([own, *others], new_samples(self.spec, len(indices))), labels


def open_domains(config: DataConfig, comm: Communicator | None = None) -> Domains:
    """Open the data of ``data.url`` and ``data.unpaired``; see :func:`open_dataset`."""
    # Each has an equal part of the memory.
    share = {"memory_bytes": config.memory_bytes // (1 + len(config.unpaired)), "unpaired": {}}
    own = open_dataset(config.model_copy(update=share), comm)
    others = {}
    for name, given in config.unpaired.items():
        key = f"data.unpaired.{name}"
        options = options_for(given.url, config.url, config.storage_options)
        values = {
            **{each: getattr(given, each) for each in type(given).model_fields},
            "storage_options": options | given.storage_options,
        }
        try:
            there = config.model_copy(update=share | _OWN_KEYS | values)
            others[name] = open_dataset(there, comm)
        except DataError as error:
            if not _KEY.match(error.subject):
                raise
            message = _KEY.sub(rf"{key}.\1", str(error))
            subject = _KEY.sub(rf"{key}.\1", error.subject)
            rule = message.partition(": ")[2]
            if error.value is None:
                raise DataError(subject, rule) from error
            raise DataError(subject, rule, value=error.value) from error
        known = {TARGET, *(own.spec.fields or {})}
        if others[name].spec.fields is not None or name in known:
            rule = "must hold samples of one field, of which the data in data.url has none so named"
            raise ConfigError(key, rule, value=redact_url(given.url))
    return Domains(own, others)


def parts_of(dataset: Dataset) -> Mapping[str, Dataset]:
    """Return the data sets that are read, by field, that of the first being ""."""
    return dataset.datasets if isinstance(dataset, Domains) else {"": dataset}


def orders_of(config: Config, dataset: Dataset) -> dict[str, SampleOrder]:
    """Return the order of each data set of :func:`parts_of`, with seeds of their own."""
    return {
        name: SampleOrder.from_config(config, part.layout, _seed(config.run.seed, name))
        for name, part in parts_of(dataset).items()
    }


def state_of(orders: Mapping[str, SampleOrder]) -> dict[str, Any]:
    """Return the parameters of all orders as JSON values; see :meth:`SampleOrder.state`."""
    return {
        f"unpaired.{name}.{key}" if name else key: value
        for name, order in orders.items()
        for key, value in order.state().items()
    }


def _joined_spec(own: ReadSpec, others: Mapping[str, ReadSpec]) -> ReadSpec:
    fields = {
        name: FieldSpec(
            **each.model_dump(include=set(FieldSpec.model_fields) - {"component"}),
            component=f"{name}.*",
        )
        for name, each in others.items()
    }
    values = {
        "component": own.component if own.fields else f"{TARGET}.*",
        "fields": {**(own.fields or {}), **fields},
    }
    return ReadSpec.model_validate({**own.model_dump(), **values})


def _seed(seed: int, name: str) -> int:
    return int(hash_words(seed, *name.encode())[0]) % 2**63 if name else seed
