"""Inception score on the evaluator's logits (Salimans et al., 2016, arXiv:1606.03498).

exp of the mean Kullback-Leibler divergence of each image's class probabilities from their average. It is the mean over
splits of 5,000 images or more in their order, unshuffled, as in guided-diffusion's evaluator: ten splits for 50,000
images, and one for fewer than 10,000. It grows with the size of a split.
"""

from itertools import pairwise

import torch
from torch import Tensor

from benchmarks.metrics import Evidence, Metric, Value
from benchmarks.metrics._bootstrap import REPLICATES, resampling_weights, with_interval

SPLIT = 5000


def inception_score(logits: Tensor, splits: int) -> float:
    """Mean score of `splits` consecutive parts of logits [N, C]."""
    scores = [_scores(part, torch.ones(1, len(part), dtype=torch.float64)) for part in _split(logits, splits)]
    return torch.cat(scores).mean().item()


def compute(evidence: Evidence, generator: torch.Generator) -> Value:
    """Inception score of the logits; images are resampled within their split."""
    logits = evidence.features.logits
    splits = max(1, len(logits) // SPLIT)
    replicates = [
        _scores(part, resampling_weights(len(part), REPLICATES, generator)) for part in _split(logits, splits)
    ]
    return with_interval(inception_score(logits, splits), torch.stack(replicates).mean(dim=0), len(logits))


def _split(logits: Tensor, splits: int) -> list[Tensor]:
    bounds = [index * len(logits) // splits for index in range(splits + 1)]
    return [logits[start:end] for start, end in pairwise(bounds)]


def _scores(logits: Tensor, weights: Tensor) -> Tensor:
    # One score for each row of image counts [R, N].
    log_probabilities = logits.double().log_softmax(dim=1)
    probabilities = log_probabilities.exp()
    negative_entropy = weights @ (probabilities * log_probabilities).sum(dim=1) / len(logits)
    average = weights @ probabilities / len(logits)
    return (negative_entropy - torch.xlogy(average, average).sum(dim=1)).exp()


METRIC = Metric(name="is_score", position=80, label="IS{count}", better="higher", digits=2, compute=compute)
