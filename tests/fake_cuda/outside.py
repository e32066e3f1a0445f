"""Device memory of what a run does outside of steps, on fake CUDA tensors."""

from __future__ import annotations

import gc

import torch
from fake_cases import CASES, CUDA, fake_cuda

from gatdist.bench.step_costs import CostMode, fake_networks, replace_tensors
from gatdist.config import EvaluateConfig
from gatdist.data.modalities import ReadSpec
from gatdist.data.sample_format import sample_format_of
from gatdist.evaluation import Evaluator, Extractor, register_feature_extractor
from gatdist.evaluation.distances import Gaussian
from gatdist.evaluation.inception import Inception
from gatdist.evaluation.statistics import Statistics, StatisticsOnly
from gatdist.parallel.communicator import LocalCommunicator
from gatdist.runs import Sampler
from gatdist.runs.checkpoints import Snapshots

NUM_FEATURES = 2048


@register_feature_extractor("untrained")
class Untrained(Extractor):
    """The published network of the FID without its weights."""

    num_features = NUM_FEATURES

    def __init__(self, dataset, comm):
        with torch.utils._python_dispatch._disable_current_modes(), torch.device("meta"):
            self.network = Inception(1008).eval().requires_grad_(False)
        replace_tensors(self.network, CUDA)

    def __call__(self, samples):
        return self.network(samples)


def measure(name: str) -> dict[str, int]:
    """Return bytes: of the networks, and at most allocated besides them by each activity."""
    gc.disable()  # the peak of live bytes must not depend on when it runs
    case = CASES[name]()
    config = case.config
    at_once = config.at_once(1, "cuda")
    spec = ReadSpec(modality="image", sample_shape=list(case.shape))
    with fake_cuda(), CostMode(CUDA) as mode:
        given = config, case.shape, case.classes, case.metadata
        _, networks, _ = fake_networks(*given, device=CUDA)
        tensors = {f"{i}/{k}": t for i, n in enumerate(networks) for k, t in n.state_dict().items()}
        generator = networks[0].eval().requires_grad_(False)
        sampler = Sampler.from_config(config, generator, case.classes, "test", at_once=at_once)
        mean, covariance = torch.zeros(NUM_FEATURES), torch.zeros(NUM_FEATURES, NUM_FEATURES)
        known = Statistics(Gaussian(mean.double(), covariance.double()))
        evaluator = Evaluator(
            EvaluateConfig(metrics=["fid"], num_samples=256, features="untrained"),
            StatisticsOnly(known, sample_format_of(spec)),
            LocalCommunicator(CUDA),
            CUDA,
            at_once=at_once,
        )

        def most(activity) -> int:
            costs = mode.start()
            before = costs.peak_bytes
            activity()
            return costs.peak_bytes - before

        return {
            "networks": sum(t.numel() * t.element_size() for t in tensors.values()),
            "snapshot": most(lambda: Snapshots().take(tensors)),
            "evaluation": most(lambda: evaluator(sampler)),
        }
