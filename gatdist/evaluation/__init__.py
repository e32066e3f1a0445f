"""How good the generator is: features, distances between sets of them, and a protocol."""

from gatdist.evaluation.evaluator import Evaluation, Evaluator, FeatureSet, metrics
from gatdist.evaluation.features import Extractor, extractors, register_feature_extractor

__all__ = [
    "Evaluation",
    "Evaluator",
    "Extractor",
    "FeatureSet",
    "extractors",
    "metrics",
    "register_feature_extractor",
]
