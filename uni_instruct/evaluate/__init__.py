"""Score generated images against a data set, with torch-fidelity. Scoring needs torch; importing this package does not."""

from uni_instruct.evaluate.evaluator import Evaluator, evaluate_images
from uni_instruct.evaluate.extractors import EXTRACTORS, PRETRAINED, Extractor, Features
from uni_instruct.evaluate.scores import METRICS, Scores, frechet_distance
from uni_instruct.evaluate.statistics import Statistics, open_reference, write_statistics

__all__ = [
    "EXTRACTORS",
    "METRICS",
    "PRETRAINED",
    "Evaluator",
    "Extractor",
    "Features",
    "Scores",
    "Statistics",
    "evaluate_images",
    "frechet_distance",
    "open_reference",
    "write_statistics",
]
