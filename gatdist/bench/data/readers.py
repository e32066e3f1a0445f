"""Readers of the same pictures, and the limits: each an endless iterator of uint8 batches.

All decode with simplejpeg, shuffle as their users would, and have the same number of threads or
worker processes.
"""

from __future__ import annotations

import itertools
import shutil
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
from torch import Tensor

from gatdist.config import DataConfig, load_config
from gatdist.data import Loader, SampleOrder, open_dataset
from gatdist.data.codecs import decode_image_into

BATCH = 64
_LANES = 64
_READ_BYTES = 4 * 2**20

# Given the folder of a data set, threads and what to close at the end: batches, as long as wanted.
Reader = Callable[[Path, int, ExitStack], Iterator[Any]]


def gatdist(folder: Path, threads: int, stack: ExitStack) -> Iterator[Tensor]:
    """Ours."""
    loader = stack.enter_context(open_loader(str(folder), threads))
    return (batch.samples for batch in loader)


def open_loader(
    url: str, threads: int, *, position: int = 0, rank: int = 0, world_size: int = 1, **data: Any
) -> Loader:
    """A loader as one worker of a run has it.

    Args:
        url: of the data set.
        threads: that decode.
        position: where the run is.
        rank: of the worker.
        world_size: of the run; each worker has ``BATCH`` samples a step.
        data: more keys of the configuration's section.
    """
    config = load_config("digits", [f"run.global_batch={BATCH * world_size}"])
    keys = {"url": url, "decode_threads": threads} | data
    config = config.model_copy(update={"data": DataConfig.model_validate(keys)})
    dataset = open_dataset(config.data)
    return Loader(
        dataset,
        SampleOrder.from_config(config, dataset),
        global_batch=config.step_samples,
        rank=rank,
        world_size=world_size,
        position=position,
        config=config.data,
    )


def bare_read(folder: Path, threads: int, stack: ExitStack) -> Iterator[int]:
    """A limit: all bytes of the shards, read one after the other; gives samples, not batches."""
    manifest_samples = open_dataset(DataConfig(url=str(folder)))
    sizes = [size for _, size in manifest_samples.shard_sizes]
    per_batch = sum(sizes) / manifest_samples.num_samples * BATCH
    read = 0.0
    for path in itertools.cycle(sorted(folder.glob("*.tar"))):
        with path.open("rb", buffering=0) as file:
            while chunk := file.read(_READ_BYTES):
                read += len(chunk)
                while read >= per_batch:
                    read -= per_batch
                    yield BATCH


def bare_decode(folder: Path, threads: int, stack: ExitStack) -> Iterator[Tensor]:
    """A limit: decoding from memory into batches that are there already."""
    contents = list(itertools.islice(_files(folder), 2048))
    size = open_dataset(DataConfig(url=str(folder))).sample_shape[1]
    out = [np.empty((BATCH, size, size, 3), np.uint8) for _ in range(4)]
    pool = stack.enter_context(ThreadPoolExecutor(threads))

    def decode(number: int, share: int) -> None:
        for row in range(share, BATCH, threads):
            content = contents[(number * BATCH + row) % len(contents)]
            decode_image_into(content, out[number % 4][row])

    ahead = [[pool.submit(decode, n, share) for share in range(threads)] for n in range(2)]
    for number in itertools.count(2):
        ahead.append([pool.submit(decode, number, share) for share in range(threads)])
        for future in ahead.pop(0):
            future.result()
        yield torch.from_numpy(out[(number - 2) % 4])


def webdataset(folder: Path, threads: int, stack: ExitStack) -> Iterator[Tensor]:
    """The webdataset library, in worker processes."""
    import webdataset as wds

    shards = sorted(str(path) for path in folder.glob("*.tar"))
    dataset = (
        wds.WebDataset(shards, shardshuffle=len(shards), resampled=False, seed=0)
        .repeat()
        .shuffle(1000)
        .map(_decoded_jpg)
        .batched(BATCH, collation_fn=_stacked)
    )
    return iter(wds.WebLoader(dataset, batch_size=None, num_workers=threads))


def litdata(folder: Path, threads: int, stack: ExitStack) -> Iterator[Tensor]:
    """litdata, from chunks of its own, in worker processes."""
    from litdata import StreamingDataLoader, StreamingDataset
    from litdata.streaming.writer import BinaryWriter

    chunks = folder / "litdata"
    if not (chunks / "index.json").exists():
        shutil.rmtree(chunks, ignore_errors=True)
        writer = BinaryWriter(str(chunks), chunk_bytes=64 * 2**20)
        for i, content in enumerate(_files(folder)):
            writer[i] = content
        writer.done()
        writer.merge()

    class Decoded(StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, index: Any) -> Tensor:
            return torch.from_numpy(_decoded(super().__getitem__(index)))

    dataset = Decoded(str(chunks), shuffle=True)
    loader = StreamingDataLoader(dataset, batch_size=BATCH, num_workers=threads)
    return itertools.chain.from_iterable(itertools.repeat(loader))


def grain(folder: Path, threads: int, stack: ExitStack) -> Iterator[Any]:
    """grain, over loose files, with its reading threads (its processes fork)."""
    import grain as library

    source = _Loose(_loose(folder))
    dataset = library.MapDataset.source(source).shuffle(seed=0).repeat().batch(BATCH)
    options = library.ReadOptions(num_threads=threads, prefetch_buffer_size=4)
    return iter(dataset.to_iter_dataset(options))


def torch_files(folder: Path, threads: int, stack: ExitStack) -> Iterator[Tensor]:
    """Torch's DataLoader over loose files, in worker processes."""
    dataset: Any = _Loose(_loose(folder))
    loader = torch.utils.data.DataLoader(
        dataset, BATCH, shuffle=True, num_workers=threads, collate_fn=_stacked, drop_last=True
    )
    return itertools.chain.from_iterable(itertools.repeat(loader))


LIMITS: dict[str, Reader] = {"bare_read": bare_read, "bare_decode": bare_decode}
PEERS: dict[str, tuple[str, Reader]] = {
    "webdataset": ("webdataset", webdataset),
    "litdata": ("litdata", litdata),
    "grain": ("grain", grain),
    "torch_files": ("torch", torch_files),
}
OURS: dict[str, Reader] = {"gatdist": gatdist}


def _files(folder: Path) -> Iterator[bytes]:
    """The JPEGs of all shards."""
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as archive:
            for member in archive:
                file = archive.extractfile(member)
                assert file is not None
                yield file.read()


def _loose(folder: Path) -> list[str]:
    """The same pictures as files of their own, written on first use."""
    loose = folder / "loose"
    done = loose / "done"
    if not done.exists():
        loose.mkdir(exist_ok=True)
        for i, content in enumerate(_files(folder)):
            (loose / f"{i:08d}.jpg").write_bytes(content)
        done.touch()
    return sorted(str(path) for path in loose.glob("*.jpg"))


class _Loose:
    """Files by number, decoded."""

    def __init__(self, paths: list[str]) -> None:
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Any:
        return _decoded(Path(self._paths[index]).read_bytes())


def _decoded(content: bytes) -> Any:
    return simplejpeg.decode_jpeg(content)


def _decoded_jpg(sample: dict[str, Any]) -> Any:
    return _decoded(sample["jpg"])


def _stacked(samples: list[Any]) -> Tensor:
    return torch.from_numpy(np.stack(samples))
