"""Precision and recall of Kynkaanniemi et al. (2019, arXiv:1904.06991), as torch-fidelity computes them of features.

The features are the evaluator's, as in guided-diffusion's evaluator; torch-fidelity takes those of VGG-16 unless told.
A set of images spans the union of the balls around each of them that reach to its third nearest neighbour in the set.
Precision is the share of a model's images inside the data's balls, recall the share of the data inside the model's.
"""

import torch
from torch import Tensor
from torch_fidelity.metric_prc import calc_cdist_part

NEIGHBOURS = 3
# Distances of so many images to all others are in memory at once: 200 MB for 50,000 others.
ROWS = 1000


def radii_of(centres: Tensor) -> Tensor:
    """The radius of the ball around each of the centres [M, D]: [M].

    Of three centres or fewer, a ball reaches to the furthest. Raises ValueError for a single centre.
    """
    if len(centres) < 2:
        raise ValueError(f"Neighbours are found among two or more images; got {len(centres)}.")
    nearest = min(NEIGHBOURS, len(centres) - 1) + 1  # The nearest is the image itself
    return torch.cat([calc_cdist_part(rows, centres).kthvalue(nearest).values for rows in centres.split(ROWS)])


def inside(features: Tensor, centres: Tensor, radii: Tensor | None = None) -> Tensor:
    """Which of the features [N, D] lie in a ball around any of the centres [M, D]: float64 [N], one or zero.

    ``radii`` [M] are those of `radii_of`, where they are known already.
    """
    if radii is None:
        radii = radii_of(centres)
    return torch.cat([(calc_cdist_part(rows, centres) <= radii).any(dim=1) for rows in features.split(ROWS)]).double()
