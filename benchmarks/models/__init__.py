"""Model families: one file each says how a checkpoint becomes a UNet, a scheduler and a decoder.

A file holds ``FAMILY``, and with that is in the suite.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:  # importing diffusers takes seconds, and not all that knows of families needs it
    from diffusers import SchedulerMixin

    from tfmq.network.backbone import Network
    from tfmq.network.sampling import Conditioning


@dataclass(frozen=True)
class Model:
    """A loaded checkpoint, in evaluation mode.

    Attributes:
        latent_shape: (C, H, W) of the noise that sampling starts from.
        decode: latents (B, C, H, W) -> images uint8 (B, 3, height, width).
        conditioning: prompts, one an image -> what these images are conditioned on; None for an unconditional model.
            Raises ValueError for a prompt that the model does not know.
    """

    unet: Network
    scheduler: SchedulerMixin
    latent_shape: tuple[int, int, int]
    decode: Callable[[Tensor], Tensor]
    conditioning: Callable[[Sequence[str]], Conditioning] | None = None


def rounded(images: Tensor) -> Tensor:
    """Images (B, 3, height, width) of -1 to 1 as uint8 on the CPU, rounded as diffusers' pipelines do."""
    return (images / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8).cpu()


@dataclass(frozen=True)
class Family:
    """A kind of model.

    Attributes:
        load: folder of a checkpoint and a device -> Model. Raises ValueError naming a missing or damaged file.
        save_tiny: writes a tiny checkpoint with random weights (from a seed) to a folder, for tests.
        network: the part of a checkpoint's folder that holds the network.
    """

    load: Callable[[Path, torch.device], Model]
    save_tiny: Callable[[Path, int], None]
    network: str = "unet"
