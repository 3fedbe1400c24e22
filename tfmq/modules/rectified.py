"""ReLU in the place of another activation function."""

from __future__ import annotations

from torch import nn


class Rectified(nn.ReLU):
    """ReLU that took the place of another activation function, and that a checkpoint therefore names."""
