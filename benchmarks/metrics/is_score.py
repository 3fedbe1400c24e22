"""Inception score on the evaluator's logits (Salimans et al., 2016, arXiv:1606.03498).

exp of the mean Kullback-Leibler divergence of each image's class probabilities from their average. It is the mean over
splits of 5,000 images or more in their order, unshuffled, as in guided-diffusion's evaluator: ten splits for 50,000
images, and one for fewer than 10,000. It grows with the size of a split.
"""

from itertools import pairwise

import torch
from torch import Tensor

from benchmarks.metrics import Evidence, Metric, Value
from benchmarks.metrics._interval import REPLICATES, kept_images, with_interval

SPLIT = 5000


def inception_score(logits: Tensor, splits: int) -> float:
    """Mean score of `splits` consecutive parts of logits [N, C]."""
    return _scores(logits, torch.ones(1, len(logits), dtype=torch.float64), splits).item()


def compute(evidence: Evidence, generator: torch.Generator) -> Value:
    """Inception score of the logits."""
    logits = evidence.features.logits
    splits = max(1, len(logits) // SPLIT)
    masks = kept_images(len(logits), REPLICATES, generator)
    scores = _scores(logits, torch.cat([torch.ones_like(masks[:1]), masks]), splits)
    return with_interval(scores[0].item(), scores[1:], len(logits))


def _scores(logits: Tensor, masks: Tensor, splits: int) -> Tensor:
    # One score for each subset of the images, from masks [R, N].
    scores = []
    bounds = [index * len(logits) // splits for index in range(splits + 1)]
    for start, end in pairwise(bounds):
        log_probabilities = logits[start:end].double().log_softmax(dim=1)
        probabilities = log_probabilities.exp()
        kept = masks[:, start:end]
        shares = kept / kept.sum(dim=1, keepdim=True)
        average = shares @ probabilities
        negative_entropy = shares @ (probabilities * log_probabilities).sum(dim=1)
        scores.append((negative_entropy - torch.xlogy(average, average).sum(dim=1)).exp())
    return torch.stack(scores).mean(dim=0)


METRIC = Metric(name="is_score", position=80, label="IS{count}", better="higher", digits=2, compute=compute)
