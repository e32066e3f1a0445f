"""Evaluation of a generator: features, metrics of them, and the protocol of a measurement."""

from gatdist.evaluation.evaluator import Evaluation, Evaluator
from gatdist.evaluation.features import Extractor, extractors, register_feature_extractor
from gatdist.evaluation.metrics import Metric, SampleSet, metrics

__all__ = [
    "Evaluation",
    "Evaluator",
    "Extractor",
    "Metric",
    "SampleSet",
    "extractors",
    "metrics",
    "register_feature_extractor",
]
