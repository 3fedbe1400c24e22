"""Factors that move the range of an input's channels into the weight, jointly for all time steps.

    W x = (W diag(s)) (x / s)

holds for any positive s, one for each input channel. Chosen well, x / s has channels of like ranges, so that one grid
serves them all.
"""

from __future__ import annotations

import torch
from torch import Tensor


def channel_largest(x: Tensor, dim: int) -> Tensor:
    """The largest magnitude of each channel, which is dimension ``dim``, in each row of ``x`` (N, ...): (N, C)."""
    return x.transpose(1, dim).flatten(2).abs().amax(2) if x.dim() > 2 else x.abs()


def step_groups(steps: int, groups: int) -> Tensor:
    """The group (steps,) of each of so many time steps in order: consecutive, and as even in size as can be."""
    return torch.arange(steps) * min(groups, steps) // steps


def joint_factors(input_largest: Tensor, weight_largest: Tensor, strength: float, most: float) -> Tensor:
    """Factors (C,) of the input channels, from their largest magnitudes in each group of steps (G, C).

    In group g channel c alone would ask for SmoothQuant's factor (arXiv 2211.10438, eq. 4),

        f_gc = max|x_gc|^a / max|w_c|^(1 - a),

    divided by its geometric mean over the channels, since a factor that all channels share changes nothing. The joint
    factor is the mean over the groups weighted by the channel's range there, s_c = sum_g |x_gc| f_gc / sum_g |x_gc|:
    what a channel is like where it is wide counts most. Its geometric mean is made 1 again, and what is more than
    ``most``, or less than its inverse, is cut. A channel that is 0 in the input or in the weight has the factor 1.

    Args:
        weight_largest: (C,), the largest magnitude of the weights that each channel meets.
        strength: a, from 0 to 1; at 1 input ranges alone decide.
        most: at least 1.
    """
    x, w = input_largest.double(), weight_largest.double()
    used = (x.amax(0) > 0) & (w > 0)
    factors = torch.where((x > 0) & used, x.pow(strength) / w.pow(1 - strength), 0)
    factors = factors / _geometric_mean(factors)
    joint = (x * factors).sum(0) / x.sum(0)
    joint = torch.where(used, joint, 0)
    joint = (joint / _geometric_mean(joint)).clamp(1 / most, most)
    return torch.where(used, joint, 1).to(input_largest.dtype)


def _geometric_mean(values: Tensor) -> Tensor:
    """Of what is above 0 along the last dimension, which stays as one of size 1; 1 where nothing is."""
    counted = values > 0
    logarithms = torch.where(counted, values, 1).log()
    return (logarithms.sum(-1, keepdim=True) / counted.sum(-1, keepdim=True).clamp_min(1)).exp()
