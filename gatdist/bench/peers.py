"""The alternating step of :class:`.reference.Bare` in Lightning and accelerate, without logging."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from itertools import repeat
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from gatdist.bench.cases import Case, Size
from gatdist.bench.reference import ReferenceCase
from gatdist.bench.rounds import Seconds


def _imported(name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return import_module(name)


@dataclass(frozen=True)
class _Repeated:
    """A loader of one batch, ``count`` times."""

    batch: Tensor
    count: int

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Tensor]:
        return repeat(self.batch, self.count)


class Lightning(ReferenceCase):
    """A ``Trainer`` with manual optimization; its loop is measured, not its start."""

    def __init__(self, size: Size) -> None:
        self._library = _imported("lightning.pytorch")
        super().__init__(size)
        self._module = _lightning_module(self._library, self)

    def step(self) -> None:
        self.run(1)

    def run(self, num_steps: int) -> Seconds:
        # One step before the first that counts and one after the last: from the start of one step
        # to that of another, so that all of the trainer's loop is measured.
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        trainer = self._library.Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        began = self._module.began = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it recommends workers for the loader
            trainer.fit(self._module, _Repeated(self.real, num_steps + 2))
        first, last = began[1], began[num_steps + 1]
        return Seconds(last.wall - first.wall, last.cpu - first.cpu)


def _lightning_module(library: Any, case: ReferenceCase) -> Any:
    class Module(library.LightningModule):  # type: ignore[misc]  # the library is Any
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.generator, self.discriminator = case.generator, case.discriminator
            self.began: list[Seconds] = []

        def configure_optimizers(self) -> list[torch.optim.Optimizer]:
            return [case.g_optimizer, case.d_optimizer]

        def training_step(self, real: Tensor, batch_idx: int) -> None:
            self.began.append(Seconds(time.perf_counter(), time.process_time()))
            g_optimizer, d_optimizer = self.optimizers()
            latents = case.latents()

            self.toggle_optimizer(d_optimizer)  # freezes the generator
            d_optimizer.zero_grad()
            fakes = self.generator(latents)
            loss = softplus(-self.discriminator(real)) + softplus(self.discriminator(fakes))
            self.manual_backward(loss.mean())
            d_optimizer.step()
            self.untoggle_optimizer(d_optimizer)

            self.toggle_optimizer(g_optimizer)
            g_optimizer.zero_grad()
            loss = softplus(-self.discriminator(self.generator(latents)))
            self.manual_backward(loss.mean())
            g_optimizer.step()
            self.untoggle_optimizer(g_optimizer)

    return Module()


class Accelerate(ReferenceCase):
    """A hand-written loop with prepared networks and optimizers."""

    def __init__(self, size: Size) -> None:
        library = _imported("accelerate")
        super().__init__(size)
        self._accelerator = library.Accelerator(cpu=True)
        self._networks = self._accelerator.prepare(self.generator, self.discriminator)
        self._optimizers = self._accelerator.prepare(self.g_optimizer, self.d_optimizer)

    def step(self) -> None:
        generator, discriminator = self._networks
        g_optimizer, d_optimizer = self._optimizers
        latents = self.latents()

        d_optimizer.zero_grad()
        with torch.no_grad():
            fakes = generator(latents)
        loss = softplus(-discriminator(self.real)) + softplus(discriminator(fakes))
        self._accelerator.backward(loss.mean())
        d_optimizer.step()

        discriminator.requires_grad_(False)
        g_optimizer.zero_grad()
        loss = softplus(-discriminator(generator(latents)))
        self._accelerator.backward(loss.mean())
        g_optimizer.step()
        discriminator.requires_grad_(True)


PEERS: dict[str, Callable[[Size], Case]] = {"lightning": Lightning, "accelerate": Accelerate}
