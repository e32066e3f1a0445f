"""The work of ``gatdist apply``: generate from some files, in tiles where they are large."""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import groupby
from typing import Any, ClassVar, NamedTuple, Self

import torch
from pydantic import BaseModel, ConfigDict, PositiveInt
from torch import Tensor

from gatdist.common.devices import device_named
from gatdist.common.errors import ConfigError
from gatdist.common.numerics import tf32
from gatdist.config import DataConfig
from gatdist.data.codecs import CodecError
from gatdist.data.format.manifest import open_shards, read_manifest
from gatdist.models.buffers import buffers_kept
from gatdist.models.tiling import Axis, filled, in_tiles, measure, periods_of
from gatdist.packing.entries import Entry, Skipped, all_named, printable
from gatdist.packing.fetch import Fetcher
from gatdist.packing.processes import Report, ShardTask
from gatdist.packing.processes import Worker as BaseWorker
from gatdist.runs import load_run
from gatdist.runs.applying.files import Reader, readable_fields, writer
from gatdist.runs.generator import Generator
from gatdist.storage import Store

SPOOL = "apply-spool"  # a folder in OUT with copies of compressed archives, while it is needed
STRICT_HINT = "Fix or remove them, or omit --strict"
_FIX_SHARDS = "Copy the manifest and the indexes there"
# Side of a tile, in positions of the input, by the input's number of axes.
_TILES = {1: 2**18, 2: 2**10}
# Largest output of a network that can't be tiled, in positions.
_MAX_WHOLE = 2**24


class Request(BaseModel):
    """What to apply to what; options as in :func:`gatdist.apply`."""

    model_config = ConfigDict(frozen=True)

    run: str
    source: str
    dest: str
    checkpoint: str = ""
    kind: str | None = None
    column: str | None = None
    tile: PositiveInt | None = None
    batch: PositiveInt = 1
    device: str = ""
    label: str = ""  # number or name of a class
    strict: bool = False
    source_options: dict[str, Any] = {}
    dest_options: dict[str, Any] = {}
    allowed_origins: tuple[str, ...] = ()


class Job(Request):
    """What all tasks share: a request whose source is the folder of the files, and more."""

    is_dataset: bool  # the source has a manifest
    class_number: int | None  # of all outputs; None: unconditional


@dataclass(frozen=True)
class Task(ShardTask):
    """Some files, and the names of their outputs."""

    entries: Sequence[Entry]
    outputs: Sequence[str]

    @classmethod
    def from_json(cls, text: str) -> Self:
        number, entries, outputs = json.loads(text)
        return cls(number, [Entry.from_json(entry) for entry in entries], outputs)


class Record(BaseModel):
    """The result of a task."""

    model_config = ConfigDict(frozen=True)

    skipped: list[Skipped] = []


class _Input(NamedTuple):
    name: str  # of its output
    field: str
    value: Tensor  # [c, *sides], on the CPU
    length: int | None  # of its output
    source: str  # name, for messages


class Worker(BaseWorker[Record]):
    """Generates from files; a file's output does not depend on other files or workers."""

    job_type: ClassVar = Job
    task_type: ClassVar = Task
    record_type: ClassVar = Record

    def __init__(self, job: Job) -> None:
        self._job = job
        self._dest = Store(job.dest, job.dest_options)
        source = source_of(job.source, job.source_options, job.is_dataset)
        self._fetcher = Fetcher([source, self._dest.child(SPOOL)], job.allowed_origins)

    def __exit__(self, *exception: object) -> None:
        self._fetcher.__exit__(*exception)

    @cached_property
    def _applied(self) -> Applied:
        job = self._job
        run = load_run(Store(job.run), device_named(job.device), job.checkpoint)
        generator = Generator.of(run)
        return Applied(generator, tile=job.tile, batch=job.batch, class_number=job.class_number)

    def do(self, task: Task, report: Report) -> Record:
        generator = self._applied.generator
        read = Reader(generator, readable_fields(generator, self._job.run))
        encode = writer(generator)
        skipped: list[Skipped] = []

        def skip(source: str, reason: str) -> None:
            skipped.append((printable(source), reason))
            if self._job.strict:
                raise all_named(skipped, hint=STRICT_HINT)
            report(1, 0)

        inputs = self._inputs(task, read, skip)
        for one, made in self._applied.each(inputs):
            if isinstance(made, str):
                skip(one.source, made)
                continue
            self._dest.publish(one.name, encode(made, one.length))
            report(1, 0)
        return Record(skipped=skipped)

    def _inputs(self, task: Task, read: Reader, skip: Any) -> Iterator[_Input]:
        names = dict(zip((entry.name for entry in task.entries), task.outputs, strict=True))
        for entry, (content, *_) in self._fetcher.fetch(task.entries):
            try:
                if isinstance(content, str):
                    raise CodecError(content)
                field, value, length = read(entry.fields[0].component, content)
            except CodecError as error:
                skip(entry.name, str(error))
                continue
            yield _Input(names[entry.name], field, value, length, entry.name)


def source_of(url: str, options: dict[str, Any], is_dataset: bool) -> Store:
    """Open the folder of the inputs; of a data set, that of its tars."""
    store = Store(url, options)
    if not is_dataset:
        return store
    given = DataConfig(url=url, storage_options=options)
    return open_shards(store, read_manifest(store), given, fix=_FIX_SHARDS)


class Applied:
    """A generator for inputs of any size.

    Args:
        generator: On its device.
        tile: Largest side that is generated at once, in positions of the input; None chooses it.
        batch: Inputs, or tiles of one, at a time. Fewer are filled up.
        class_number: Of all outputs, if the generator is class-conditional.
    """

    def __init__(
        self,
        generator: Generator,
        *,
        tile: int | None = None,
        batch: int = 1,
        class_number: int | None = None,
    ) -> None:
        self.generator, self._tile, self._batch = generator, tile, batch
        self._class_number = class_number
        self._axes: dict[str, tuple[Axis, ...] | None] = {}
        self._device = next(generator.parameters()).device

    def axes(self, field: str) -> tuple[Axis, ...] | None:
        """Return how outputs depend on a field's positions; None if it can't be cut.

        Measured once, on the CPU in float64.

        Raises:
            ConfigError: The chosen tile is too small.
        """
        if field not in self._axes:
            double = copy.deepcopy(self.generator).cpu().double()
            found = measure(
                lambda x: self._made(double, {field: x}, torch.zeros(len(x), dtype=torch.int64)),
                self.generator.shape_of(field),
            )
            shortest = max(axis.shortest for axis in found) if found else 0
            if self._tile is not None and self._tile < shortest:
                rule = f"must be at least {shortest:,}, twice the receptive field"
                raise ConfigError("--tile", rule, value=self._tile)
            self._axes[field] = found
        return self._axes[field]

    def each(self, inputs: Iterable[_Input]) -> Iterator[tuple[_Input, Tensor | str]]:
        """Yield each input with its output [1, c, *sides], or the reason why there is none."""
        for _, group in groupby(inputs, key=lambda one: (one.field, one.value.shape)):
            waiting: list[_Input] = []
            for one in group:
                waiting.append(one)
                if len(waiting) == self._batch or self._is_large(one):
                    yield from self._together(waiting)
                    waiting = []
            if waiting:
                yield from self._together(waiting)

    def _is_large(self, one: _Input) -> bool:
        return max(one.value.shape[1:]) > self._side(one.field)

    def _side(self, field: str) -> int:
        if self._tile:
            return self._tile
        target = self.generator.shapes.target
        scale = max(1, target[-1] // self.generator.shape_of(field)[-1])
        return max(1, _TILES.get(len(target) - 1, _TILES[1]) // scale)

    @tf32(False)
    @torch.no_grad()
    def _together(self, group: Sequence[_Input]) -> list[tuple[_Input, Tensor | str]]:
        try:
            if self._is_large(group[0]):
                return [(group[0], self._large(group[0]))]
            values = filled(torch.stack([one.value for one in group]), self._batch)
            keys = filled(torch.tensor([_key(one.name) for one in group]), self._batch)
            made = self._call(group[0].field, values, keys)
        except CodecError as error:
            return [(one, str(error)) for one in group]
        return [(one, output[None]) for one, output in zip(group, made, strict=False)]

    def _large(self, one: _Input) -> Tensor:
        axes, sides, key = self.axes(one.field), one.value.shape[1:], torch.tensor([_key(one.name)])
        if axes is None:
            if math.prod(sides) > _MAX_WHOLE:
                raise CodecError(
                    f"is {_size(one.value)}, the limit is {_MAX_WHOLE:,} positions, since this "
                    "network can't be applied to tiles: an output depends on all of the input"
                )
            return self._call(one.field, one.value[None], key)
        if any(side % axis.period for side, axis in zip(sides, axes, strict=True)):
            raise CodecError(self._refusal(one.field, one.value))
        return in_tiles(
            lambda x: self._call(one.field, x, key.expand(len(x))),
            one.value[None],
            axes,
            [max(self._side(one.field), axis.shortest) for axis in axes],
            batch=self._batch,
        )

    def _call(self, field: str, values: Tensor, keys: Tensor) -> Tensor:
        """Return the output of inputs [n, c, *sides], on the CPU. Raises CodecError."""
        dtype = next(self.generator.parameters()).dtype
        given = {field: values.to(self._device, dtype)}
        try:
            with buffers_kept(self.generator.network):
                made = self._made(self.generator, given, keys.to(self._device)).cpu()
        except RuntimeError as error:  # out of memory too, for which the CPU has no class
            if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
                rule = f"is {_size(values[0])}, too large for the memory"
                raise CodecError(rule, hint="Choose a smaller --tile or --batch") from None
            raise CodecError(self._refusal(field, values[0])) from error
        shapes = zip(
            self.generator.shapes.target[1:], self.generator.shape_of(field)[1:], strict=True
        )
        scales = [Fraction(target, side) for target, side in shapes]
        sides = zip(values.shape[2:], made.shape[2:], scales, strict=True)
        if any(scale * before != after for before, after, scale in sides):
            raise CodecError(self._refusal(field, values[0]))
        return made

    def _made(self, generator: Generator, fields: dict[str, Tensor], keys: Tensor) -> Tensor:
        labels = None if self._class_number is None else torch.full_like(keys, self._class_number)
        return generator.made(fields, keys, labels=labels)

    def _refusal(self, field: str, value: Tensor) -> str:
        shape = self.generator.shape_of(field)
        like = next(self.generator.parameters()).detach()

        def made(x: Tensor) -> Tensor:
            return self._made(self.generator, {field: x}, torch.arange(len(x), device=x.device))

        found = periods_of(made, shape, like)
        usual = " × ".join(f"{side:,}" for side in shape[1:])
        rule = f"is {_size(value)}, which the network does not accept: it takes {usual}"
        if found and any(found):
            rule += f", or multiples of {' × '.join(map(str, found))}"
        return rule


def _size(value: Tensor) -> str:
    return " × ".join(f"{side:,}" for side in value.shape[1:])


def _key(name: str) -> int:
    """Return the key of a file's random numbers, a function of its output's name."""
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
