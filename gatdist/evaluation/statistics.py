"""Mean and covariance of real features in a file, with which FIDs are computed without the data.

The format is that of TTUR (Heusel et al. 2017) and pytorch-fid: an ``.npz`` with the arrays ``mu``
[d] and ``sigma`` [d, d]. Files of gatdist also have ``protocol``, the JSON of how the features were
computed; others ignore it.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray

from gatdist.common.errors import ConfigError, DataError
from gatdist.common.strict_json import parse_json
from gatdist.config import redact_url
from gatdist.data.codecs import CodecError
from gatdist.data.codecs.arrays import read_npy
from gatdist.data.sample_format import SampleFormat
from gatdist.evaluation.distances import Gaussian
from gatdist.storage.store import at_file

ENDING = ".npz"
_MAX_FEATURES = 8192
_MAX_ARRAY_BYTES = 8 * _MAX_FEATURES**2 + 2**16
_MAX_PROTOCOL_BYTES = 2**16
_MAX_NUMBER = 1e100  # whose square is finite
# Of the largest value: what float32 and other libraries may leave of symmetry and of eigenvalues.
_TOLERANCE = 1e-4
_HINT = "Compute it with: gatdist statistics DATA --out FILE"
_DAMAGED: tuple[type[Exception], ...] = (
    *(zipfile.BadZipFile, zlib.error, CodecError, EOFError, OSError, NotImplementedError),
    *(RuntimeError, ValueError, OverflowError, MemoryError),
)


@dataclass(frozen=True)
class Statistics:
    """Mean and covariance of the features of real samples.

    Attributes:
        fit: float64, on the CPU.
        protocol: JSON values, how the features were computed; {} of files of other programs.
        sha256: of the file, in hex; "" before it is written.
        url: of the file, without secrets.
    """

    fit: Gaussian
    protocol: Mapping[str, Any] = field(default_factory=dict)
    sha256: str = ""
    url: str = ""

    @property
    def of_data(self) -> dict[str, Any]:
        """``data``, its fingerprint, and ``num_real`` of the protocol, if recorded and valid."""
        data, count = self.protocol.get("data"), self.protocol.get("num_real")
        found: dict[str, Any] = {}
        if isinstance(data, str) and re.fullmatch("[0-9a-f]{64}", data):
            found["data"] = data
        if type(count) is int and 1 < count < 2**48:
            found["num_real"] = count
        return found

    def require_features(self, protocol: Mapping[str, Any], num_features: int) -> None:
        """Raise DataError unless these features have this protocol and number, if recorded."""
        d = len(self.fit.mean)
        if d != num_features:
            rule = f"is of {d:,} features, and evaluate.features has {num_features:,}"
            raise DataError(self.url, rule, hint="Use the same evaluate.features for both")
        for key, value in protocol.items():
            theirs = self.protocol.get(key, value)
            if theirs != value:
                rule = f"was computed with {key} {theirs!r}, and not {value!r}"
                raise DataError(self.url, rule, hint="Use the same evaluate.features for both")

    def encode(self) -> bytes:
        """Return the file; the same statistics give the same bytes."""
        file = io.BytesIO()
        mean, covariance = (x.cpu().numpy() for x in (self.fit.mean, self.fit.covariance))
        protocol = np.array(json.dumps(dict(self.protocol), sort_keys=True))
        np.savez(file, mu=mean, sigma=covariance, protocol=protocol)
        return file.getvalue()


def read_statistics(url: str) -> Statistics:
    """Read the file at a URL. Raises DataError if it is not one, StorageError if it is missing."""
    shown = redact_url(url)
    store, name = at_file(url)
    if store.size(name) > 2 * _MAX_ARRAY_BYTES:
        _refuse(shown, f"has more than {2 * _MAX_ARRAY_BYTES:,} bytes")
    content = store.read(name)
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            names = archive.namelist()
            for key in ("mu.npy", "sigma.npy"):
                if names.count(key) != 1:
                    _refuse(shown, f"must hold one array {key.removesuffix('.npy')!r}")
            mean = read_npy(_member(archive, "mu.npy", _MAX_ARRAY_BYTES))
            covariance = read_npy(_member(archive, "sigma.npy", _MAX_ARRAY_BYTES))
            protocol = _protocol(archive) if names.count("protocol.npy") == 1 else {}
    except _DAMAGED as error:
        _refuse(shown, f"is not a readable .npz file ({' '.join(str(error).split())})")
    fit = _gaussian(mean, covariance, shown)
    return Statistics(fit, protocol, hashlib.sha256(content).hexdigest(), shown)


def _member(archive: zipfile.ZipFile, name: str, max_bytes: int) -> bytes:
    """Return a member's content; what its directory entry says of its size is not trusted."""
    with archive.open(name) as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise CodecError(f"{name} has more than {max_bytes:,} bytes")
    return content


def _protocol(archive: zipfile.ZipFile) -> Mapping[str, Any]:
    text = read_npy(_member(archive, "protocol.npy", _MAX_PROTOCOL_BYTES))
    if text.shape != () or text.dtype.kind != "U":
        return {}  # another program's
    found = parse_json(str(text))
    if not isinstance(found, dict):
        raise CodecError("protocol is not a JSON object")
    return found


def _gaussian(mean: NDArray[Any], covariance: NDArray[Any], shown: str) -> Gaussian:
    d = mean.shape[0] if mean.ndim == 1 else 0
    if not 0 < d <= _MAX_FEATURES or covariance.shape != (d, d):
        rule = f"must hold mu [d] and sigma [d, d], with d at most {_MAX_FEATURES:,}"
        _refuse(shown, f"{rule}; they are {list(mean.shape)} and {list(covariance.shape)}")
    for name, array in (("mu", mean), ("sigma", covariance)):
        if array.dtype.kind != "f" or array.dtype.itemsize not in (4, 8):
            _refuse(shown, f"{name} must be float32 or float64, and is {array.dtype}")
        if not (np.abs(array.astype(np.float64)) <= _MAX_NUMBER).all():  # nor NaN
            _refuse(shown, f"{name} holds numbers that are not finite, or too large")
    # A copy in the machine's byte order; torch knows no other.
    first, second = (torch.from_numpy(x.astype(np.float64)) for x in (mean, covariance))
    most = _TOLERANCE * float(second.abs().max())
    if float((second - second.T).abs().max()) > most:
        _refuse(shown, "sigma is not symmetric")
    second = (second + second.T) / 2
    if float(torch.linalg.eigvalsh(second)[0]) < -most:
        _refuse(shown, "sigma has negative eigenvalues, so that it is no covariance")
    return Gaussian(first, second)


def _refuse(subject: str, rule: str) -> NoReturn:
    raise DataError(subject, rule, hint=_HINT)


class StatisticsOnly:
    """Stands for a data set of which only the statistics of features are known.

    An extractor is built with it as with a :class:`~gatdist.data.dataset.Dataset`; the data is
    unlabelled, and reading raises ConfigError. ``sample_format`` is that of the samples to compare,
    ``num_samples`` 0 if the file does not record it.
    """

    num_classes = 0

    def __init__(self, statistics: Statistics, sample_format: SampleFormat) -> None:
        self.statistics, self.sample_format = statistics, sample_format
        self.modality = sample_format.modality
        self.num_samples: int = statistics.of_data.get("num_real", 0)

    def read(self, indices: object) -> NoReturn:
        """Raise ConfigError."""
        rule = f"needs samples of the real data, and {self.statistics.url} holds statistics alone"
        raise ConfigError("evaluate.features", rule, hint="Choose others, or use --against DATA")
