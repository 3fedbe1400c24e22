"""What training the class-conditional model takes that the unconditional one does not: classes, and their balance."""

from collections.abc import Sequence

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn

from benchmarks.models.class_ldm import ClassEmbedding
from benchmarks.small.data import Emoji

# Its ten images, the skin tones by themselves, are in no class.
UNCLASSED = "Component"


class ClassConditional(nn.Module):
    """A UNet and the embedding of the class that it is told, which train together."""

    def __init__(self, unet: UNet2DConditionModel, embedding: ClassEmbedding) -> None:
        super().__init__()
        self.unet = unet
        self.embedding = embedding

    def forward(self, latents: Tensor, timesteps: Tensor, classes: Tensor) -> UNet2DConditionOutput:
        """The predicted noise, [B, C, H, W], for classes [B]."""
        return self.unet(latents, timesteps, self.embedding(classes))


def class_names(rows: Sequence[Emoji]) -> list[str]:
    """The categories that are classes, in alphabetical order."""
    return sorted({row.category for row in rows} - {UNCLASSED})


def class_indices(rows: Sequence[Emoji], classes: Sequence[str]) -> Tensor:
    """The class of each image, [N]; -1 for those in none."""
    return torch.tensor([-1 if row.category == UNCLASSED else classes.index(row.category) for row in rows])


def balance(classes: Tensor) -> Tensor:
    """Indices of the images, those of rare classes several times: about the square root of the largest one's excess.

    [N] -> [M]. So no class is rare in an epoch, and none is learned by heart (square-root sampling, Mahajan et al.,
    2018, arXiv:1805.00932).
    """
    counts = torch.bincount(classes)
    times = (counts.max() / counts.clamp(min=1)).sqrt().round().long()
    return torch.arange(len(classes)).repeat_interleave(times[classes])
