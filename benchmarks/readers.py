"""Endless iterators of shuffled batches of JPEGs, and upper bounds, with equally many threads."""

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
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from gatdist.config import DataConfig, cache_folder, load_config
from gatdist.data.codecs.images import decode_image_into
from gatdist.data.dataset import open_dataset
from gatdist.data.format.shard_files import write_dataset
from gatdist.data.loader import Loader
from gatdist.data.order import SampleOrder, WorkerShare
from gatdist.storage import Store

BATCH = 64
_READ_BYTES = 4 * 2**20

# (folder of a data set, threads, stack of what to close) -> endless batches
Reader = Callable[[Path, int, ExitStack], Iterator[Any]]


def gatdist(folder: Path, threads: int, stack: ExitStack) -> Iterator[Tensor]:
    loader = stack.enter_context(open_loader(str(folder), threads))
    return (batch.samples for batch in loader)


def open_loader(
    url: str, threads: int, *, position: int = 0, rank: int = 0, world_size: int = 1, **data: Any
) -> Loader:
    config = load_config("digits", [f"run.global_batch={BATCH * world_size}"])
    keys = {"url": url, "decode_threads": threads} | data
    config = config.model_copy(update={"data": DataConfig.model_validate(keys)})
    dataset = open_dataset(config.data)
    return Loader(
        dataset,
        SampleOrder.from_config(config, dataset.layout),
        WorkerShare.from_config(config, rank, world_size, position),
        config=config.data,
    )


def bare_read(folder: Path, threads: int, stack: ExitStack) -> Iterator[int]:
    """Upper bound: sequential reads of the shards; yields numbers of samples."""
    dataset = open_dataset(DataConfig(url=str(folder)))
    per_batch = dataset.num_bytes / dataset.num_samples * BATCH
    read = 0.0
    for path in itertools.cycle(sorted(folder.glob("*.tar"))):
        with path.open("rb", buffering=0) as file:
            while chunk := file.read(_READ_BYTES):
                read += len(chunk)
                while read >= per_batch:
                    read -= per_batch
                    yield BATCH


def bare_decode(
    folder: Path,
    threads: int,
    stack: ExitStack,
    decode_into: Callable[[bytes, NDArray[Any]], object] = decode_image_into,
    dtype: type = np.uint8,
) -> Iterator[Tensor]:
    """Upper bound: decoding from memory into allocated batches."""
    contents = list(itertools.islice(_files(folder), 2048))
    channels, *sizes = open_dataset(DataConfig(url=str(folder))).sample_shape
    shape = (*sizes, channels) if dtype is np.uint8 else (channels, *sizes)
    out: list[NDArray[Any]] = [np.empty((BATCH, *shape), dtype) for _ in range(4)]
    pool = stack.enter_context(ThreadPoolExecutor(threads))

    def decode(number: int, share: int) -> None:
        for row in range(share, BATCH, threads):
            content = contents[(number * BATCH + row) % len(contents)]
            decode_into(content, out[number % 4][row])

    ahead = [[pool.submit(decode, n, share) for share in range(threads)] for n in range(2)]
    for number in itertools.count(2):
        ahead.append([pool.submit(decode, number, share) for share in range(threads)])
        for future in ahead.pop(0):
            future.result()
        yield torch.from_numpy(out[(number - 2) % 4])


def webdataset(folder: Path, threads: int, stack: ExitStack) -> Iterator[Tensor]:
    import webdataset as wds

    shards = sorted(str(path) for path in folder.glob("*.tar"))
    dataset = (
        wds.WebDataset(shards, shardshuffle=len(shards), resampled=False, seed=0)
        .repeat()
        .shuffle(1000)
        .map(_decode_sample)
        .batched(BATCH, collation_fn=_stack)
    )
    return iter(wds.WebLoader(dataset, batch_size=None, num_workers=threads))


def litdata(folder: Path, threads: int, stack: ExitStack) -> Iterator[Tensor]:
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
            return torch.from_numpy(simplejpeg.decode_jpeg(super().__getitem__(index)))

    dataset = Decoded(str(chunks), shuffle=True)
    loader = StreamingDataLoader(dataset, batch_size=BATCH, num_workers=threads)
    return itertools.chain.from_iterable(itertools.repeat(loader))


def grain(folder: Path, threads: int, stack: ExitStack) -> Iterator[Any]:
    """Read loose files with grain's threads, since its processes fork."""
    import grain as library

    source = _Loose(loose_files(folder))
    dataset = library.MapDataset.source(source).shuffle(seed=0).repeat().batch(BATCH)
    options = library.ReadOptions(num_threads=threads, prefetch_buffer_size=4)
    return iter(dataset.to_iter_dataset(options))


def torch_files(folder: Path, threads: int, stack: ExitStack) -> Iterator[Tensor]:
    dataset: Any = _Loose(loose_files(folder))
    loader = torch.utils.data.DataLoader(
        dataset, BATCH, shuffle=True, num_workers=threads, collate_fn=_stack, drop_last=True
    )
    return itertools.chain.from_iterable(itertools.repeat(loader))


LIMITS: dict[str, Reader] = {"bare_read": bare_read, "bare_decode": bare_decode}
READERS: dict[str, Reader] = {
    **LIMITS,
    "gatdist": gatdist,
    "webdataset": webdataset,
    "litdata": litdata,
    "grain": grain,
    "torch_files": torch_files,
}


def _files(folder: Path) -> Iterator[bytes]:
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as archive:
            for member in archive:
                file = archive.extractfile(member)
                assert file is not None
                yield file.read()


def loose_files(folder: Path) -> list[str]:
    loose = folder / "loose"
    done = loose / "done"
    if not done.exists():
        loose.mkdir(exist_ok=True)
        for i, content in enumerate(_files(folder)):
            (loose / f"{i:08d}.jpg").write_bytes(content)
        done.touch()
    return sorted(str(path) for path in loose.glob("*.jpg"))


class _Loose:
    def __init__(self, paths: list[str]) -> None:
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Any:
        return simplejpeg.decode_jpeg(Path(self._paths[index]).read_bytes())


def _decode_sample(sample: dict[str, Any]) -> Any:
    return simplejpeg.decode_jpeg(sample["jpg"])


def _stack(samples: list[Any]) -> Tensor:
    return torch.from_numpy(np.stack(samples))


# The data set: random images whose JPEGs are as large as those of photographs.

_POOL = 24
_OCTAVES = ((4, 60.0), (16, 30.0), (64, 14.0), (256, 9.0))
_QUALITY = 94  # 256 × 256 pixels then take about 30 KB


def images(num: int, size: int, seed: int = 0) -> Iterator[bytes]:
    draws = np.random.default_rng([seed, size])
    pool = [_texture(draws, size) for _ in range(_POOL)]
    for _ in range(num):
        first, second = draws.choice(_POOL, 2, replace=False)
        down, right = (int(n) for n in draws.integers(0, size, 2))
        mixed = pool[first] + np.roll(pool[second], (down, right), axis=(0, 1))
        levels = np.clip(mixed + 128 + draws.uniform(-30, 30, 3), 0, 255).astype(np.uint8)
        yield simplejpeg.encode_jpeg(levels, quality=_QUALITY)


def image_folder(num: int, size: int, num_shards: int) -> Path:
    """Return a data set of random images in the cache folder, written on first use."""
    path = cache_folder() / "benchmarks" / f"images-v1-{size}-{num}-{num_shards}-0"
    if not (path / "manifest.json").exists():
        made = images(num, size)
        bounds = [num * i // num_shards for i in range(num_shards + 1)]
        shards = (
            ((f"{i:08d}", {"jpg": next(made)}) for i in range(first, end))
            for first, end in itertools.pairwise(bounds)
        )
        write_dataset(Store(str(path)), shards, modality="image", sample_shape=(3, size, size))
    return path


def _texture(draws: np.random.Generator, size: int) -> NDArray[np.float64]:
    """Noise that is weaker at finer scales, [size, size, 3], about 0."""
    total = np.zeros((size, size, 3))
    for cells, strength in _OCTAVES:
        cells = min(cells, size)
        noise = draws.uniform(0, 255, (cells, cells, 3)).astype(np.uint8)
        grown = Image.fromarray(noise).resize((size, size), Image.Resampling.BICUBIC)
        total += (np.asarray(grown) / 127.5 - 1) * strength
    return total / 2
