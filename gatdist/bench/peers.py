"""The alternating step by the frameworks that people use, as their manuals show it.

Both do what :class:`~gatdist.bench.bare.Bare` does, with the same settings and without any
logging, which is in their favour. They come with ``pip install 'gatdist[bench]'``; the functions
import them when called.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from gatdist.bench.case import Case, HandWritten, Size, adam


def lightning(size: Size) -> Case:
    """Lightning with manual optimization. Raises ImportError where it is not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import lightning.pytorch

    return _Lightning(size, lightning.pytorch)


def accelerate(size: Size) -> Case:
    """Hugging Face's accelerate. Raises ImportError where it is not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import accelerate

    return _Accelerate(size, accelerate)


PEERS: dict[str, Callable[[Size], Case]] = {"lightning": lightning, "accelerate": accelerate}


@dataclass(frozen=True)
class _Again:
    """One batch, so many times: a loader that costs nothing."""

    batch: Tensor
    count: int

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Tensor]:
        return repeat(self.batch, self.count)


class _Lightning(HandWritten):
    """Steps that a ``Trainer`` takes; its loop is measured, and its start is not."""

    def __init__(self, size: Size, library: Any) -> None:
        super().__init__(size)
        self._library = library
        self._module = _lightning_module(library, self)

    def step(self) -> None:
        """Only a trainer takes steps."""
        self.run(1)

    def run(self, num_steps: int) -> float:
        """See :meth:`Case.run`."""
        # One step before the first that counts and one after the last: from the beginning of one
        # to that of another, so that all of the trainer's loop is in between.
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
            warnings.simplefilter("ignore")  # it would like workers for the made-up data
            trainer.fit(self._module, _Again(self.real, num_steps + 2))
        return began[num_steps + 1] - began[1]


def _lightning_module(library: Any, case: HandWritten) -> Any:
    """The game as a ``LightningModule``."""

    class Module(library.LightningModule):  # type: ignore[misc]  # the library is Any
        """Discriminator, then generator, by hand."""

        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.generator, self.discriminator = case.generator, case.discriminator
            self.began: list[float] = []

        def configure_optimizers(self) -> list[torch.optim.Optimizer]:
            optim = case.config.optim
            return [
                adam(self.generator.parameters(), optim.generator),
                adam(self.discriminator.parameters(), optim.discriminator),
            ]

        def training_step(self, real: Tensor, batch_idx: int) -> None:
            self.began.append(time.perf_counter())
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


class _Accelerate(HandWritten):
    """A hand-written loop whose networks and optimizers were prepared."""

    def __init__(self, size: Size, library: Any) -> None:
        super().__init__(size)
        optim = self.config.optim
        self._accelerator = library.Accelerator(cpu=True)
        self._networks = self._accelerator.prepare(self.generator, self.discriminator)
        self._optimizers = self._accelerator.prepare(
            adam(self.generator.parameters(), optim.generator),
            adam(self.discriminator.parameters(), optim.discriminator),
        )

    def step(self) -> None:
        """Discriminator, then generator."""
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
